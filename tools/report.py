"""The command report: see mom_tools.compare.report."""

from mom_tools.compare.report import main

if __name__ == "__main__":
    main()
