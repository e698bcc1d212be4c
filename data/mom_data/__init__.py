"""The data of a training run, from raw files to batches. Each package imports only from those above it in this list.

documents   reads raw files and makes one document of each sample
shards      tokenizes documents, stores the tokens in shards, and reads them again
order       plans which documents each row of the training data holds
batches     reads the planned rows and makes tensors of them
"""

import mom_tokenizers  # noqa: F401  # must come before torch, because it sets how torch's threads wait
