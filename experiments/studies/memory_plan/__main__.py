"""Entry point: `python -m experiments.studies.memory_plan`."""

from experiments.studies.memory_plan.study import main

if __name__ == "__main__":
    main()
