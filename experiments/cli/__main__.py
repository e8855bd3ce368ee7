"""`python -m experiments.cli`, as `accelerate launch -m` calls it."""

from experiments.cli import main

main()
