"""Reading raw input: WebDataset tars and files of JSON lines become documents, and every member is accounted for.

inputs      which files a command means, and which of their documents are held out for validation
document    the entry for reading: cuts a file into parts and yields the documents of a part in order
sample      decides what document the members of one sample make
tars        finds the members of a tar and groups them into samples
json_lines  reads the lines of a JSON-lines file
raw_files   recognizes and unpacks the file formats
account     counts what became of every member
"""
