"""Measure the seams of tiled decoding: `python -m experiments.studies.seams`."""

from experiments.studies.seams.study import main

main()
