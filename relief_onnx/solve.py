"""Least squares for the weights that are left of a layer, neuron by neuron, in closed form.

For neuron j with kept inputs S: min |X_S w + b - t|^2 + lambda |w - w_old|^2, lambda = RIDGE times the mean diagonal of X'X (X centred),
more where there are few rows: FEW_ROWS times the kept inputs per row, or what `ridge` finds.
The bias b is free and costs nothing. Where only the positive part of the neuron counts (a Relu follows), a negative target is met by any
negative output: those targets are set to what the neuron emits now and the equations are solved again, a few times, with larger steps.
With less than ROUNDS_ROWS rows for each kept input that would fit the rows and not the neuron, so all of the target is met.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.gradients import kept_solution
from relief_onnx.inverse import inverse_root
from relief_onnx.ridge import best_part, few_rows
from relief_onnx.worth import LEAST_TRIED, TRIED, Appraisal

__all__ = ["MOMENT_FEATURES", "SOLVE_FLOPS", "Target", "operations", "solve"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Reals = NDArray[np.floating[Any]]
# Units from one to another, with the kept features and the inverse root of each.
Run = tuple[slice, list[tuple[NDArray[np.intp], Reals]]]

RIDGE, FEW_ROWS = 0.01, 0.3
# Features that are solved for at a time, and how often all blocks take their turn where there are several.
BLOCK, TURNS = 1024, 2
# Inputs of which X'X is held as a whole.
MOMENT_FEATURES = 6144
# Floating point operations for the inverses of a layer and the worths of its weights; beyond it blocks get smaller, to LEAST_BLOCK.
SOLVE_FLOPS, LEAST_BLOCK = 1e11, 128
# Inverses that are held at a time.
INVERSE_BYTES = 256 << 20
# Rounds for neurons that only count where they are positive, and how far each goes. More rounds were worse on samples not seen.
ROUNDS, STEP, ROUNDS_ROWS = 5, 1.6, 100


@dataclass(frozen=True)
class Target:
    """What scale * y + shift should be for a layer's output y: `wanted` and `shift` [rows, out], `scale` [out].

    one_sided: only the positive part of it counts.
    """

    wanted: Floats
    shift: Floats
    scale: Doubles
    one_sided: bool

    def of(self, y: Floats) -> Floats:
        """What y should be, seen from what it is. Not to be written to."""
        if not self.one_sided:
            return self._met
        result: Floats = np.clip(y, *self._bounds)
        return result

    @cached_property
    def _met(self) -> Floats:
        result: Floats = np.divide(self.wanted - self.shift, self.scale.astype(np.float32), dtype=np.float32)
        return result

    @cached_property
    def _bounds(self) -> tuple[Floats, Floats]:
        """Between which y is right: one and the same number where something positive is wanted, else whatever is not positive."""
        scale, opened = self.scale.astype(np.float32), self.wanted > 0
        closed = np.where(opened, self._met, np.divide(-self.shift, scale, dtype=np.float32))
        least = np.where(opened | (scale < 0), closed, np.float32(-np.inf))
        return least, np.where(opened | (scale > 0), closed, np.float32(np.inf))

    def units(self, columns: slice) -> Target:
        """The same for some units only."""
        return Target(self.wanted[:, columns], self.shift[:, columns], self.scale[columns], self.one_sided)


def solve(
    x: Floats, target: Target, weight: Doubles, bias: Doubles, keep: Flags, free_bias: bool, appraisal: Appraisal | None = None,
    flops: float = SOLVE_FLOPS, validated: bool = False,
) -> tuple[Doubles, Doubles]:  # fmt: skip
    """New weights [out, features] and biases [out]; 0 where `keep` [out, features] is not.

    x: [rows, features]; weight, bias: those that the solution stays close to. appraisal: takes what each weight is then worth.
    flops: about what it may take. validated: with a ridge chosen by cross-validation where rows are few.
    """
    weight = np.where(keep, weight, 0.0)
    inputs = float(keep.sum(1).mean()) if keep.size else 0.0
    ridge = max(RIDGE, FEW_ROWS * inputs / max(len(x), 1))
    if target.one_sided and len(x) < ROUNDS_ROWS * inputs:
        target = replace(target, one_sided=False)
    if validated and x.shape[1] <= MOMENT_FEATURES and few_rows(len(x), keep):
        ridge = _validated(x, target, weight, bias, keep, free_bias)
    in_moments = not target.one_sided and x.shape[1] <= MOMENT_FEATURES
    if in_moments and appraisal is None:
        return _by_gradients(x, target, weight, bias, keep, free_bias, ridge, min(flops, SOLVE_FLOPS))
    size = _block_size(keep, appraisal, flops)
    blocks = [slice(start, start + size) for start in range(0, x.shape[1], size)]
    turns = TURNS if len(blocks) > 1 else 1
    if in_moments and appraisal is not None:
        return _by_moments(x, target, weight, bias, keep, blocks, turns, free_bias, ridge, appraisal)
    for turn in range(turns):
        for block in blocks:
            weight, bias = _turn(x, target, weight, bias, keep, block, free_bias, ridge, appraisal if turn == turns - 1 else None)
    return weight, bias


def _validated(x: Floats, target: Target, weight: Doubles, bias: Doubles, keep: Flags, free_bias: bool) -> float:
    own, wanted, _, _ = _centred(x, target, bias, free_bias)
    return best_part(own, wanted, weight, keep)


def _centred(x: Floats, target: Target, bias: Doubles, free_bias: bool) -> tuple[Floats, Floats, Doubles, Doubles]:
    """Inputs and what neurons should emit without their means, which a free bias takes; and these means."""
    goal = target.of(np.zeros_like(target.wanted))
    offset = goal.mean(0, dtype=np.float64) if free_bias else bias
    mean = x.mean(0, dtype=np.float64) if free_bias else np.zeros(x.shape[1])
    return x - mean.astype(np.float32), goal - offset.astype(np.float32), mean, offset


@dataclass(frozen=True)
class _Moments:
    """Rows met once: X'X and X't of centred rows, the mean of the inputs, and what neurons emit at it."""

    squares: Doubles
    wanted: Doubles
    mean: Doubles
    offset: Doubles

    @classmethod
    def of(cls, x: Floats, target: Target, bias: Doubles, free_bias: bool) -> _Moments:
        own, goal, mean, offset = _centred(x, target, bias, free_bias)
        return cls((own.T @ own).astype(np.float64), (goal.T @ own).astype(np.float64), mean, offset)


def _ridge(moments: Doubles, part: float) -> float:
    return part * float(np.trace(moments)) / len(moments) + 1e-12


def _by_gradients(
    x: Floats, target: Target, weight: Doubles, bias: Doubles, keep: Flags, free_bias: bool, part: float, flops: float
) -> tuple[Doubles, Doubles]:
    """All features at once, where only the solution is wanted."""
    met = _Moments.of(x, target, bias, free_bias)
    # What the present weights explain is taken off: the equations are for the change.
    pull = met.wanted - weight @ met.squares
    weight = weight + kept_solution(met.squares, pull, _ridge(met.squares, part), keep, flops)
    return weight, met.offset - weight @ met.mean


def _by_moments(
    x: Floats, target: Target, weight: Doubles, bias: Doubles, keep: Flags, blocks: Sequence[slice], turns: int, free_bias: bool,
    part: float, appraisal: Appraisal,
) -> tuple[Doubles, Doubles]:  # fmt: skip
    """All blocks in turn from X'X and X't alone, where the target does not move with the outputs; single precision does for worths."""
    met, held = _Moments.of(x, target, bias, free_bias), _Held(turns)
    weight = weight.copy()
    for turn in range(turns):
        for block in blocks:
            inner = met.squares[block, block]
            ridge, seen = _ridge(inner, part), inner.astype(np.float32)
            for columns, roots in held.runs(block.start, _roots(seen, ridge, keep[:, block])):
                pull = met.wanted[columns, block] - weight[columns] @ met.squares[:, block]
                change = np.zeros_like(pull)
                for row, (places, root) in enumerate(roots):
                    change[row, places] = root.T @ (root @ pull[row, places].astype(np.float32))
                weight[columns, block] += change
                if turn < turns - 1:
                    continue
                pull -= change @ inner
                for row, (places, root) in enumerate(roots):
                    unit = columns.start + row
                    appraisal.judge(unit, block.start, seen, ridge, places, root, weight[unit, block], pull[row])
    return weight, met.offset - weight @ met.mean


def _turn(
    x: Floats, target: Target, weight: Doubles, bias: Doubles, keep: Flags, block: slice, free_bias: bool, part: float,
    appraisal: Appraisal | None,
) -> tuple[Doubles, Doubles]:  # fmt: skip
    """One block of features solved for, with the others as they are."""
    mean = x[:, block].mean(0, dtype=np.float64) if free_bias else np.zeros(len(range(*block.indices(x.shape[1]))))
    own = x[:, block] - mean.astype(np.float32)
    moments = (own.T @ own).astype(np.float64)
    ridge = _ridge(moments, part)
    weight, bias = weight.copy(), bias.copy()
    for columns, roots in _roots(moments, ridge, keep[:, block]):
        own_target = target.units(columns)
        y = x @ weight[columns].T.astype(np.float32) + bias[columns].astype(np.float32)
        start = weight[columns, block].copy()
        now = start.copy()
        for step in (STEP if i else 1.0 for i in range(ROUNDS if target.one_sided else 1)):
            goal = own_target.of(y)
            left = goal - y
            pull = (own.T @ left).T.astype(np.float64)
            # What the present weights explain is in y: the equations are for the change.
            change = np.zeros_like(now)
            for row, (places, root) in enumerate(roots):
                change[row, places] = step * (root.T @ (root @ (pull[row, places] + ridge * (start[row, places] - now[row, places]))))
            now += change
            y += own @ change.T.astype(np.float32)
            if free_bias:
                offset = (own_target.of(y) - y).mean(0, dtype=np.float64) if not target.one_sided else step * left.mean(0, dtype=np.float64)
                bias[columns] += offset
                y += offset.astype(np.float32)
        if appraisal is not None:
            pull = (own.T @ (own_target.of(y) - y)).T.astype(np.float64) if appraisal.additions else np.zeros_like(now)
            for row, (places, root) in enumerate(roots):
                appraisal.judge(columns.start + row, block.start, moments, ridge, places, root, now[row], pull[row])
        weight[columns, block] = now
        if free_bias:
            bias[columns] -= (now - start) @ mean
    return weight, bias


def operations(distinct: int, units: int, features: int, density: float, size: int, additions: bool) -> float:
    """About how many floating point operations one layer takes in blocks of `size` features: inverses of `distinct` units, and gains."""
    blocks, kept = -(-features // size), density * size
    tried = min(size - kept, max(LEAST_TRIED, TRIED * kept)) if additions else 0.0
    return 2 * blocks * kept**2 * (distinct * kept + units * tried)


def _block_size(keep: Flags, appraisal: Appraisal | None, flops: float) -> int:
    """Features to solve for at a time, of whole runs: BLOCK, or less where all inverses would take too much."""
    units, features = keep.shape
    distinct = len(np.unique(np.packbits(keep, axis=1), axis=0))
    density = float(keep.mean()) if keep.size else 0.0
    limit = min(SOLVE_FLOPS, flops if appraisal is None else appraisal.flops)
    additions, multiple = (False, 1) if appraisal is None else (appraisal.additions, appraisal.size)
    size: int = min(BLOCK, features)
    while size > LEAST_BLOCK and operations(distinct, units, features, density, size, additions) > limit:
        size //= 2
    return max(int(size) // multiple, 1) * multiple


def _roots(moments: Reals, ridge: float, keep: Flags) -> Iterator[Run]:
    """Runs of units with the kept features and the inverse root of each, as many at a time as memory allows."""
    pending: list[tuple[NDArray[np.intp], Reals]] = []
    known: dict[bytes, tuple[NDArray[np.intp], Reals]] = {}
    first, held = 0, 0
    for unit, row in enumerate(keep):
        key = np.packbits(row).tobytes()
        if key not in known:
            places = np.flatnonzero(row)
            system = moments.take(places, 0).take(places, 1)
            system[np.diag_indices(len(places))] += ridge
            try:
                root = inverse_root(system)
            except np.linalg.LinAlgError:  # inputs that are not finite: no finite solution, which the caller tells
                root = np.full_like(system, np.nan)
            if held + root.nbytes > INVERSE_BYTES and pending:
                yield slice(first, unit), pending
                pending, known, first, held = [], {}, unit, 0
            known[key] = places, root
            held += root.nbytes
        pending.append(known[key])
    if pending:
        yield slice(first, len(keep)), pending


class _Held:
    """Inverse roots of blocks whose turn comes again, as many as memory allows; those of other blocks are computed anew."""

    def __init__(self, turns: int) -> None:
        self._left = INVERSE_BYTES if turns > 1 else 0
        self._known: dict[int, list[Run]] = {}

    def runs(self, start: int, made: Iterator[Run]) -> Iterator[Run]:
        """Those of the block that begins at `start`, `made` where they are not held."""
        own: list[Run] = self._known.get(start, [])
        yield from own
        for run in () if own else made:
            self._left -= sum({id(root): root.nbytes for _, root in run[1]}.values())
            own = [*own, run] if self._left >= 0 else []
            yield run
        if self._left >= 0:
            self._known[start] = own
