"""Entry point: `python -m experiments.studies.large_images`."""

from experiments.studies.large_images.study import main

if __name__ == "__main__":
    main()
