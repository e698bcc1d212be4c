"""The command checkpoint: see mom_tools.model.checkpoint."""

from mom_tools.model.checkpoint import main

if __name__ == "__main__":
    main()
