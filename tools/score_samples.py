"""The command score_samples: see mom_tools.model.score_samples."""

from mom_tools.model.score_samples import main

if __name__ == "__main__":
    main()
