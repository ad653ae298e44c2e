"""How a command ends: its result on stdout, everything else on stderr, an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from blur_trainer.scripts.refusing import refusing


class Outcome:
    """The exit code: 0; 2 after a refusal, 130 after Ctrl-C."""

    code = 0

    def __init__(self, stdout: TextIO) -> None:
        self._stdout = stdout

    def say(self, text: object) -> None:
        """A part of the result."""
        self._stdout.write(f"{text}\n")


@contextmanager
def outcome(command: str) -> Iterator[Outcome]:
    """
    What is wrong with the user's words or files becomes one line and exit code 2, without a traceback.

    Libraries may print what they like (DeepSpeed does when accelerate imports it): stdout has the result alone.
    """
    found = Outcome(sys.stdout)
    try:
        with refusing(f"blur-trainer {command}") as refused, redirect_stdout(sys.stderr):
            yield found
        found.code = refused.code
    except KeyboardInterrupt:
        found.code = 130
        sys.stderr.write(f"\nblur-trainer {command}: interrupted.\n")
