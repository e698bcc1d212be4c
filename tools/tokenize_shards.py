"""The command tokenize_shards: see mom_tools.data.tokenize_shards."""

from mom_tools.data.tokenize_shards import main

if __name__ == "__main__":
    main()
