"""`python -m blur_trainer` is the command `blur-trainer`."""

import sys

from blur_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
