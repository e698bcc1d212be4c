"""The command inspect_shards: see mom_tools.data.inspect_shards."""

from mom_tools.data.inspect_shards import main

if __name__ == "__main__":
    main()
