"""Many small cases in one test: all of them run, and whatever fails is told by name. Also: which cases a run has."""

import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest


def every(cases: Mapping[str, Any] | Iterable[Any], check: Callable[..., Any]) -> None:
    """`check(*case)`, or `check(case)` where it is no tuple, for each case; one failure that lists every case's."""
    named = list(cases.items()) if isinstance(cases, Mapping) else [(repr(case), case) for case in cases]
    assert named, "no case"
    failed = []
    for name, case in named:
        try:
            check(*case) if isinstance(case, tuple) else check(case)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  the other cases are to run too
            line = next(frame.lineno for frame in traceback.extract_tb(error.__traceback__)[1:])
            failed.append(f"{name} (line {line}): {type(error).__name__}: {error}")
    if failed:
        pytest.fail(f"{len(failed)} of {len(named)} cases:\n\n" + "\n\n".join(failed))


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """What a fixture of a module is to prepare: the values of `parameter` in the module's tests that are run."""
    here = [item for item in request.session.items if item.path == request.path and not item.get_closest_marker("skip")]
    specs = [item.callspec.params for item in here if hasattr(item, "callspec")]
    return list(dict.fromkeys(params[parameter] for params in specs if parameter in params))
