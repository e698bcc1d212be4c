"""The command export_model: see mom_tools.model.export_model."""

from mom_tools.model.export_model import main

if __name__ == "__main__":
    main()
