"""The command bench_tokenizers: see mom_tools.bench.tokenizing."""

from mom_tools.bench.tokenizing import main

if __name__ == "__main__":
    main()
