"""What is wrong with words and files is said in one line. Nothing heavy is imported: some commands answer at once."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Refused:
    """The exit code of a command: 0, or 2 after a refusal."""

    code = 0


@contextmanager
def refusing(command: str) -> Iterator[Refused]:
    """What is wrong with the user's words or files becomes one line and exit code 2, without a traceback."""
    refused = Refused()
    try:
        yield refused
    except (ValueError, TypeError, OSError) as error:
        refused.code = 2
        logger.debug(command, exc_info=True)
        sys.stderr.write(f"{command}: {error}\n")
