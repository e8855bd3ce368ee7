"""Entry point: `python -m experiments.studies.seams`."""

from experiments.studies.seams.study import main

if __name__ == "__main__":
    main()
