"""The command describe_model: see mom_tools.model.describe_model."""

from mom_tools.model.describe_model import main

if __name__ == "__main__":
    main()
