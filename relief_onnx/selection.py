"""Which weights --only and --skip let through."""

from __future__ import annotations

import re

from relief_onnx.layers import Plan
from relief_onnx.options import Options

__all__ = ["select", "unmatched"]


def select(plan: Plan, only: str | None, skip: str | None) -> tuple[frozenset[str], dict[str, str]]:
    """Which weights --only and --skip let through (regular expressions over node and weight names), and why the others not.

    Embedding tables are let through only where --only names them.
    """
    allowed: set[str] = set()
    reasons: dict[str, str] = {}
    for weight, layers in plan.by_weight().items():
        names = [weight, *(layer.name for layer in layers)]
        if skip and any(re.search(skip, name) for name in names):
            reasons[weight] = f"--skip {skip} names it"
        elif only and not any(re.search(only, name) for name in names):
            reasons[weight] = f"--only {only} does not name it"
        else:
            allowed.add(weight)
    for weight, layers in plan.by_table().items():
        names = [weight, *(layer.name for layer in layers)]
        if skip and any(re.search(skip, name) for name in names):
            reasons[weight] = f"--skip {skip} names it"
        elif only and any(re.search(only, name) for name in names):
            allowed.add(weight)
    return frozenset(allowed), reasons


def unmatched(plan: Plan, options: Options) -> list[str]:
    """A sentence for each regular expression that was given and names nothing in the model: a typo, most likely."""
    names = {name for layer in (*plan.layers, *plan.tables) for name in (layer.name, layer.weight)}
    names |= {name for row in plan.unranked for name in (row.node, row.weight)}
    given = [("--skip", options.skip), *(("[layers]", pattern) for pattern, _ in options.layers)]
    return [
        f"{where} {pattern} names no layer or weight of the model, so it does nothing; relief-onnx inspect shows their names"
        for where, pattern in given if pattern and not any(re.search(pattern, name) for name in names)
    ]  # fmt: skip
