"""`python -m hf_poss.cli`, for launchers that take a module."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
