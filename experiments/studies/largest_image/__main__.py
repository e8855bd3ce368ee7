"""Measure the largest image of one machine: `python -m experiments.studies.largest_image`."""

from experiments.studies.largest_image.study import main

main()
