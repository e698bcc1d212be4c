"""The command train_tokenizers: see mom_tools.data.train_tokenizers."""

from mom_tools.data.train_tokenizers import main

if __name__ == "__main__":
    main()
