"""`python -m nestopt_ext`."""

import sys

from nestopt_ext.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
