"""Compare estimated and measured memory: `python -m experiments.studies.memory_plan`."""

from experiments.studies.memory_plan.study import main

main()
