"""The command generate: see mom_tools.model.generate."""

from mom_tools.model.generate import main

if __name__ == "__main__":
    main()
