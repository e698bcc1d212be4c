"""The command eval: see mom_tools.model.eval."""

from mom_tools.model.eval import main

if __name__ == "__main__":
    main()
