"""Checks of settings: of their types, as the fields of a dataclass are annotated, and of their ranges."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SCALARS = {float: "a number", int: "a whole number", bool: "True or False", str: "a text", NoneType: "None"}


def check_fields(
    settings: Any, ranges: Mapping[str, str] | None = None, owner: str = "", skipped: Collection[str] = ()
) -> None:
    """
    Check every field of a dataclass whose annotation is made of `int`, `float`, `bool`, `str`, `None` and `Literal`.

    Args:
        settings: an instance of a dataclass.
        ranges: field -> interval, e.g. `"[0, 1)"`. `None` is in every interval.
        owner: named in the error, e.g. the objective whose arguments these are.
        skipped: fields that take more than their annotation says.

    Raises:
        TypeError: a value is not of the annotated type. `True` is no number, and 1 is not `True`.
        ValueError: a number is NaN or out of its range, or a text is none of those that a `Literal` lists.
    """
    for name, kinds in _scalar_fields(settings.__class__).items():
        if name not in skipped:
            check_value(name, getattr(settings, name), kinds, (ranges or {}).get(name), owner)


def check_value(name: str, value: Any, kinds: Sequence[Any], interval: str | None = None, owner: str = "") -> None:
    """As [`check_fields`], for one value and the types that it may have."""
    what = f"{owner}: `{name}`" if owner else f"`{name}`"
    listed = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    known = any(value is each or (isinstance(each, str) and value == each) for each in listed)
    if not known and not any(kind in _SCALARS and _is(value, kind) for kind in kinds):
        error = ValueError if isinstance(value, str) and listed else TypeError
        accepted = [repr(each) for each in listed] + [_SCALARS[kind] for kind in kinds if kind in _SCALARS]
        raise error(f"{what} must be {' or '.join(accepted)}, got {value!r}.{_advice(value, kinds)}")
    interval = interval or "[-inf, inf]"  # NaN is in none
    if isinstance(value, Real) and not isinstance(value, bool) and not within(value, interval):
        raise ValueError(f"{what} must be {in_words(interval, value)}, got {value!r}.")


def within(value: Any, interval: str) -> bool:
    """Whether a number is in an interval such as `"[0, 1)"`: a bracket includes its end, a parenthesis does not."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return bool(above and (value <= high if interval[-1] == "]" else value < high))


def in_words(interval: str, value: Any) -> str:
    """`"[0, 1)"` -> `"a number of at least 0 and below 1"`; for a `value` that is not in it."""
    low, high = (end.strip() for end in interval[1:-1].split(","))
    ends = [f"{'of at least' if interval[0] == '[' else 'above'} {low}"] * (low != "-inf")
    ends += [f"{'of at most' if interval[-1] == ']' else 'below'} {high}"] * (high != "inf")
    finite = "finite " if math.isinf(value) else ""
    return " ".join([f"a {finite}number", *([" and ".join(ends)] * bool(ends))])


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def _advice(value: Any, kinds: Sequence[Any]) -> str:
    if not isinstance(value, str) or not {int, float, bool} & set(kinds):
        return ""
    return " It is a text: leave the quotes out. (YAML reads 1e-5 as a text: write 1.0e-5.)"


@cache
def _scalar_fields(settings: Any) -> dict[str, tuple[Any, ...]]:
    """The fields that can be checked by their annotation alone, and the types that each may have."""
    hints, found = get_type_hints(settings), {}
    for name in (field.name for field in fields(settings)):
        hint = hints[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(kind in _SCALARS or get_origin(kind) is Literal for kind in kinds):
            found[name] = kinds
    return found
