"""Which process of a torchrun this is. Needs no torch: torchrun says it in the environment."""

from __future__ import annotations

import os

__all__ = ["is_first", "rank", "world"]


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0
