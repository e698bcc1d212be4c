"""The order of the training data, planned from the indices of the shards alone, without reading any tokens.

plan      which documents each row of the training data holds, for any row number
packing   how documents are cut into pieces, and pieces are put together into rows
forecast  what a run will see of its data: padding, cut documents, the mixture, and epochs by modality
"""
