"""`python -m blur_trainer` is the command `blur-trainer`."""

import sys

from blur_trainer.cli.main import main

sys.exit(main())
