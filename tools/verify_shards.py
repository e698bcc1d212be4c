"""The command verify_shards: see mom_tools.data.verify_shards."""

from mom_tools.data.verify_shards import main

if __name__ == "__main__":
    main()
