"""Fronts of (forgotten, kept) points: which runs no other run beats in both, and the area below them."""

import math
from collections.abc import Sequence

Point = Sequence[float]  # (forgotten, kept), more is better in both


def share_of_way(value: float, start: float, aim: float, *, clip: bool = True) -> float:
    """
    `(value - start) / (aim - start)`: 0 at the start, 1 at the aim, whichever of the two is larger.

    With the target's value as start and the retrained model's as aim this is how much is forgotten; with 0 as start and
    the target's value as aim it is the share that is kept.

    Args:
        value, start, aim (`float`): in the metric's unit.
        clip (`bool`, defaults to `True`): values beyond an end count as that end. To forget more than the retrained
            model is not to forget better.

    Raises:
        ValueError: if start and aim are the same or not finite: there is no way between them.
    """
    if start == aim or not (math.isfinite(start) and math.isfinite(aim)):
        raise ValueError(f"From {start} to {aim} there is no way to be measured: pass two different finite numbers.")
    share = (value - start) / (aim - start)
    return min(max(share, 0.0), 1.0) if clip and not math.isnan(share) else share


def pareto_front(points: Sequence[Point]) -> list[int]:
    """
    The positions of the points that no other point beats, from the least to the most forgotten.

    A point beats another one if it is at least as good in both numbers and better in one. Of equal points the first is
    returned. Points with a NaN are on no front.

    Args:
        points (`Sequence`): `(forgotten, kept)` pairs, more is better in both.

    Example:

    >>> pareto_front([(0.2, 0.9), (0.5, 0.8), (0.4, 0.7), (0.9, 0.1)])
    [0, 1, 3]
    """
    known = [i for i, point in enumerate(points) if not any(math.isnan(number) for number in point)]
    front: list[int] = []
    best = -math.inf
    for i in sorted(known, key=lambda i: (-points[i][0], -points[i][1])):
        if points[i][1] > best or not front:
            front.append(i)
            best = points[i][1]
    return front[::-1]


def front_area(points: Sequence[Point], reference: Point = (0.0, 0.0)) -> float:
    """
    The area of all that some point beats and that beats the reference (the hypervolume in two dimensions).

    With two shares ([`share_of_way`]) and the reference `(0, 0)` it lies between 0 (nothing forgotten or nothing kept)
    and 1 (all forgotten that the retrained model does not know, all kept). Points that are not better than the
    reference in both numbers add nothing.

    Args:
        points (`Sequence`): `(forgotten, kept)` pairs, more is better in both, in any order.
        reference (`(float, float)`, defaults to `(0, 0)`): a point that all are to beat. State it with the area.

    Raises:
        ValueError: if a number of a point on the front is infinite. Clip it.

    Example:

    >>> round(front_area([(0.5, 0.8), (0.9, 0.1)]), 6)
    0.44
    """
    area, left = 0.0, reference[0]
    for i in pareto_front(points):
        forgotten, kept = points[i]
        if not (math.isfinite(forgotten) and math.isfinite(kept)):
            raise ValueError(f"The point ({forgotten}, {kept}) has no finite area: clip its numbers (share_of_way).")
        area += max(forgotten - left, 0.0) * max(kept - reference[1], 0.0)
        left = max(left, forgotten)
    return area
