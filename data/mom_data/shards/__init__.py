"""Token datasets: how shards are made from documents, stored, verified, and read.

format    the file format of shards and their indices, and the writer
manifest  what a dataset's manifest must satisfy
storage   reads the files of a dataset from a local folder, or from a remote one through a cache
dataset   opens a finished dataset and reads documents from it
content   identifies the contents of raw files by their checksums
tokenize  makes token shards from one part of a raw file
online    opens raw files as a dataset, and tokenizes each part when it is first wanted
verify    checks every byte of a dataset
"""
