"""The command map_vocabulary: see mom_tools.data.map_vocabulary."""

from mom_tools.data.map_vocabulary import main

if __name__ == "__main__":
    main()
