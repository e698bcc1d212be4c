"""The command pack_stats: see mom_tools.data.pack_stats."""

from mom_tools.data.pack_stats import main

if __name__ == "__main__":
    main()
