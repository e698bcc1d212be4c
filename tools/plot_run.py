"""The command plot_run: see mom_tools.compare.plot_run."""

from mom_tools.compare.plot_run import main

if __name__ == "__main__":
    main()
