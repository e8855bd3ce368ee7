"""Images from 64 to 2048 px: `python -m experiments.studies.large_images`."""

from experiments.studies.large_images.study import main

main()
