"""`python -m vqvae2` is the command `vqvae2`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
