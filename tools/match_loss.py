"""The command match_loss: see mom_tools.compare.match_loss."""

from mom_tools.compare.match_loss import main

if __name__ == "__main__":
    main()
