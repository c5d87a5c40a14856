"""What random graphs are made of: a pool of tensors, and steps that add to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from builders import Net

BATCH = 2
Shape = tuple[int, ...]


class Pool:
    """Tensors made so far, with shapes for batch BATCH; a step picks from the newest with higher chance."""

    def __init__(self, net: Net) -> None:
        self.net, self.tensors = net, {}  # type: ignore[var-annotated]

    def add(self, name: str, *shape: int) -> None:
        self.tensors[name] = shape
        self.net.ranks[name] = len(shape)

    def pick(self, rng: np.random.Generator, rank: int | None = None, like: Shape | None = None, but: str = "") -> tuple[str, Shape] | None:
        fitting = [
            (name, shape)
            for name, shape in self.tensors.items()
            if (rank is None or len(shape) == rank) and (like is None or shape == like) and name != but
        ]
        if not fitting:
            return None
        return fitting[-1] if rng.random() < 0.7 else fitting[rng.integers(len(fitting))]


Step = Callable[[Net, Pool, np.random.Generator], None]
STEPS: list[Step] = []


def step(rank: int | None) -> Callable[[Callable[..., None]], Step]:
    """A step that starts from one tensor of that rank; nothing happens where there is none."""

    def wrap(function: Callable[..., None]) -> Step:
        def run(net: Net, pool: Pool, rng: np.random.Generator) -> None:
            found = pool.pick(rng, rank)
            if found is not None:
                function(net, pool, rng, *found)

        run.__name__ = function.__name__
        STEPS.append(run)
        return run

    return wrap


def channels(rng: np.random.Generator) -> int:
    return int(rng.choice([2, 3, 4, 6, 8]))


def maybe_bias(net: Net, rng: np.random.Generator, size: int) -> list[str]:
    return [net.bias(size)] if rng.random() < 0.6 else []


def conv_weight(net: Net, rng: np.random.Generator, *shape: int) -> str:
    """A weight, now and then behind a Transpose, a Reshape or an Identity."""
    if rng.random() < 0.15:
        form = net.ints(*shape) if rng.random() < 0.5 else net.ints(0, -1, *shape[2:])
        stored = (shape[0], int(np.prod(shape[1:]))) if shape[2:] == (1, 1) else (*shape, 1)
        return str(net.op("Reshape", net.weight(*stored), form))
    if rng.random() < 0.15:
        order = [*range(1, len(shape)), 0]
        stored = [shape[i] for i in order]
        return str(net.op("Transpose", net.weight(*stored), perm=[len(shape) - 1, *range(len(shape) - 1)]))
    weight = net.weight(*shape)
    return str(net.op("Identity", weight)) if rng.random() < 0.1 else weight
