"""The command plan_run: see mom_tools.model.plan_run."""

from mom_tools.model.plan_run import main

if __name__ == "__main__":
    main()
