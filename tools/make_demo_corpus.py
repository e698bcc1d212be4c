"""The command make_demo_corpus: see mom_tools.demo.corpus."""

from mom_tools.demo.corpus import main

if __name__ == "__main__":
    main()
