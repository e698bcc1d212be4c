"""The command bench_data: see mom_tools.bench.loading."""

from mom_tools.bench.loading import main

if __name__ == "__main__":
    main()
