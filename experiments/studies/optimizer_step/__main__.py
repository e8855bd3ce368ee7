"""Entry point: `python -m experiments.studies.optimizer_step`."""

from experiments.studies.optimizer_step.study import main

if __name__ == "__main__":
    main()
