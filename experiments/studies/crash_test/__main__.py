"""Entry point: `python -m experiments.studies.crash_test`."""

import sys

from experiments.studies.crash_test.study import main

if __name__ == "__main__":
    sys.exit(main())
