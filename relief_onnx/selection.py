"""Which weights --only and --skip let through."""

from __future__ import annotations

import re

from relief_onnx.layers import Plan

__all__ = ["select"]


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
