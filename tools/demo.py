"""The command demo: see mom_tools.demo.demo."""

from mom_tools.demo.demo import main

if __name__ == "__main__":
    main()
