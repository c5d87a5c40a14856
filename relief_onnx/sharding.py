"""Statistics of several processes as one: each measures its part of the batches, then their totals are put together.

A statistic names the attributes that hold its totals in `TOTALS`, and how two of them make one in `UNITE` (by default they are added).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["collect", "restore", "unite"]

Unite = Callable[[Any, Any], Any]


def collect(statistic: Any) -> Any:
    """The totals of a statistic as dicts, arrays and numbers."""
    names = getattr(statistic, "TOTALS", None)
    if names is not None:
        return {name: collect(getattr(statistic, name)) for name in names}
    if isinstance(statistic, dict):
        return {key: collect(value) for key, value in statistic.items()}
    return statistic


def unite(parts: Sequence[Any], how: Unite = np.add) -> Any:
    """The totals of several processes put together, in their order."""
    if not isinstance(parts[0], dict):
        result = parts[0]
        for part in parts[1:]:
            result = how(result, part)
        return result
    keys = list(dict.fromkeys(key for part in parts for key in part))
    return {key: unite([part[key] for part in parts if key in part], how) for key in keys}


def restore(statistic: Any, totals: Any) -> None:
    """Give a statistic these totals."""
    for name in statistic.TOTALS:
        own = getattr(statistic, name)
        if hasattr(own, "TOTALS"):
            restore(own, totals[name])
        else:
            setattr(statistic, name, totals[name])
