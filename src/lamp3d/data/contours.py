"""Contours of a size unlike that of the other cases': often a slip, and hard to see once a network is trained on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lamp3d.data.dataset import Case
from lamp3d.data.store import CaseStore

LEAST_CASES = 8
"""With contours of an organ; fewer do not say what is usual."""

LEAST_FACTOR = 5.0
"""Between a size and the median that is worth a look; more for organs whose sizes differ much, such as tumours."""

SPREADS = 3.5
"""Deviations of the sizes' logarithms beyond which one is an outlier (Iglewicz and Hoaglin, 1993)."""

_DEVIATION_OF_MAD = 1.4826  # of a normal distribution, from its median absolute deviation


@dataclass(frozen=True)
class UnusualContour:
    """One organ in one case.

    Attributes:
        case, organ: their names.
        ml: its size.
        usual_ml: the median of all cases that have contours of it.
    """

    case: str
    organ: str
    ml: float
    usual_ml: float

    def __str__(self) -> str:
        return f"{self.organ} of {self.case}, {self.ml:.3g} ml where {self.usual_ml:.3g} are usual"


def unusual_contours(store: CaseStore, cases: Sequence[Case]) -> list[UnusualContour]:
    """Those that are many times larger or smaller than usual, the farthest off first.

    Args:
        store: in which the cases are prepared.
        cases: those with contours are compared; an organ that is annotated and absent has no size.
    """
    sizes: dict[str, dict[str, float]] = {organ: {} for organ in store.dataset.organs}
    for case in cases:
        for organ, ml in store.organ_ml(case).items():
            sizes[organ][case.name] = ml
    found = []
    for organ, by_case in sizes.items():
        if len(by_case) < LEAST_CASES:
            continue
        logarithms = np.log(list(by_case.values()))
        usual = float(np.median(logarithms))
        deviation = _DEVIATION_OF_MAD * float(np.median(np.abs(logarithms - usual)))
        farthest = max(math.log(LEAST_FACTOR), SPREADS * deviation)
        found += [
            UnusualContour(name, organ, ml, math.exp(usual))
            for name, ml in by_case.items()
            if abs(math.log(ml) - usual) > farthest
        ]
    return sorted(found, key=lambda contour: -abs(math.log(contour.ml / contour.usual_ml)))


def unseen_organs(store: CaseStore, cases: Sequence[Case]) -> list[str]:
    """Those that no case shows, so that nothing can be learnt of them.

    Args:
        store: in which the cases are prepared.
        cases: that are trained on.
    """
    seen = {organ for case in cases for organ in store.organ_ml(case)}
    return [organ for organ in store.dataset.organs if organ not in seen]
