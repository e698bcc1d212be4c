"""The command bench: see mom_tools.bench.kernels."""

from mom_tools.bench.kernels import main

if __name__ == "__main__":
    main()
