"""Entry point: `python -m experiments.studies.largest_image`."""

from experiments.studies.largest_image.study import main

if __name__ == "__main__":
    main()
