"""`python -m omnicompile`: the command line."""

import sys

from omnicompile.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
