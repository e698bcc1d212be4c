"""The command paper_mini: see mom_tools.paper.miniature."""

from mom_tools.paper.miniature import main

if __name__ == "__main__":
    main()
