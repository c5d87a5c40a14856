"""Symbolic sizes: integers times symbols, and the arithmetic that keeps equal expressions equal.

A size is a monomial `coefficient * symbol * symbol ...`, so products and exact quotients are exact. Whatever is no monomial (n + 1,
n // 2, min(n, m)) becomes a new symbol, remembered by its operands: the same expression always gives the same symbol. Of a sum with
an integer the definition is kept too, so that n + 1 - 1 is n again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["ONE", "ZERO", "Dim", "Symbols", "product"]


@dataclass(frozen=True, slots=True)
class Dim:
    """A size, or any whole number of a small tensor: `coefficient` times the product of `symbols` (sorted)."""

    coefficient: int
    symbols: tuple[str, ...] = ()

    @staticmethod
    def of(size: int | str) -> Dim:
        """The integer, or the symbol of that name."""
        return Dim(1, (size,)) if isinstance(size, str) else _integer(int(size))

    @property
    def value(self) -> int | None:
        """The integer, or None where a symbol takes part."""
        return None if self.symbols else self.coefficient

    def __mul__(self, other: Dim) -> Dim:
        coefficient = self.coefficient * other.coefficient
        return Dim(coefficient, tuple(sorted(self.symbols + other.symbols)) if coefficient else ())

    def divided(self, other: Dim) -> Dim | None:
        """The exact quotient, or None where it is no monomial."""
        if not other.coefficient or self.coefficient % other.coefficient:
            return None
        rest = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        return Dim(self.coefficient // other.coefficient, tuple(rest))

    def __str__(self) -> str:
        if not self.symbols:
            return str(self.coefficient)
        return "*".join(([] if self.coefficient == 1 else [str(self.coefficient)]) + list(self.symbols))


@lru_cache(maxsize=4096)
def _integer(size: int) -> Dim:
    return Dim(size)


MEANINGLESS = frozenset({"", "none", "unknown", "-1", "*"})
ZERO, ONE = Dim(0), Dim(1)


def product(sizes: Iterable[Dim]) -> Dim:
    """The product; 1 where there are none."""
    result = ONE
    for size in sizes:
        result = result * size
    return result


def _ordered(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    return (a, b) if (a.symbols, a.coefficient) <= (b.symbols, b.coefficient) else (b, a)


class Symbols:
    """Makes symbols, knows which of them are sizes (never negative), and calculates with Dims."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        # The file's own names that are trusted: where exporters write "?" or "None" they mean any size.
        self.names = frozenset(name for name in names if not name.startswith("?") and name.lower() not in MEANINGLESS)
        self.sizes = set(self.names)
        self._memo: dict[Hashable, Dim] = {}
        self._sums: dict[str, tuple[Dim, int]] = {}
        self._count = 0

    def fresh(self, size: bool = True) -> Dim:
        """A symbol that was never seen before; `size` promises that it is not negative."""
        self._count += 1
        name = f"?{self._count}"
        if size:
            self.sizes.add(name)
        return Dim(1, (name,))

    def memo(self, key: Hashable, size: bool = True) -> Dim:
        """The symbol of an expression."""
        if key not in self._memo:
            self._memo[key] = self.fresh(size)
        found = self._memo[key]
        if size:
            self.sizes.update(found.symbols)
        return found

    def is_size(self, a: Dim) -> bool:
        """Whether it can never be negative."""
        return a.coefficient >= 0 and all(symbol in self.sizes for symbol in a.symbols)

    def span(self, a: Dim, b: Dim) -> tuple[float, float]:
        """The least and the largest that a - b can be."""
        if a.symbols == b.symbols:
            difference = a.coefficient - b.coefficient
            if not a.symbols or not difference:
                return difference, difference
            if self.is_size(Dim(1, a.symbols)):
                return (0, math.inf) if difference > 0 else (-math.inf, 0)
        (low_a, high_a), (low_b, high_b) = self._range(a), self._range(b)
        return low_a - high_b, high_a - low_b

    def _range(self, a: Dim) -> tuple[float, float]:
        if not a.symbols:
            return a.coefficient, a.coefficient
        if not self.is_size(Dim(1, a.symbols)):
            return -math.inf, math.inf
        return (0, math.inf) if a.coefficient > 0 else (-math.inf, 0)

    def _split(self, a: Dim) -> tuple[Dim, int]:
        """The number as something plus an integer."""
        if not a.symbols:
            return ZERO, a.coefficient
        return self._sums.get(a.symbols[0], (a, 0)) if a.coefficient == 1 and len(a.symbols) == 1 else (a, 0)

    def add(self, a: Dim, b: Dim) -> Dim:
        """a + b"""
        if a.symbols == b.symbols or not a.coefficient or not b.coefficient:
            coefficient = a.coefficient + b.coefficient
            return Dim(coefficient, (a.symbols or b.symbols) if coefficient else ())
        (base_a, offset_a), (base_b, offset_b) = self._split(a), self._split(b)
        offset = offset_a + offset_b
        if base_a.symbols != base_b.symbols and base_a.symbols and base_b.symbols:
            positive = self.is_size(base_a) and self.is_size(base_b)
            base = self.memo(("+", *_ordered(base_a, base_b)), positive)
        else:
            base = self.add(base_a, base_b)
        if not base.symbols or not offset:
            return Dim.of(base.coefficient + offset) if not base.symbols else base
        total = self.memo(("+", base, offset), self.is_size(base) and offset > 0)
        self._sums[total.symbols[0]] = (base, offset)
        return total

    def sub(self, a: Dim, b: Dim) -> Dim:
        """a - b"""
        return self.add(a, Dim(-b.coefficient, b.symbols))

    def div(self, a: Dim, b: Dim) -> Dim:
        """a / b rounded towards zero, as ONNX divides integers."""
        exact = a.divided(b)
        if exact is not None:
            return exact
        if not a.symbols and not b.symbols and b.coefficient:
            quotient = abs(a.coefficient) // abs(b.coefficient)
            return Dim.of(quotient if (a.coefficient < 0) == (b.coefficient < 0) else -quotient)
        if self.is_size(a) and self.is_size(b):
            return self.floor(a, b)
        return self.memo(("trunc", a, b), False)

    def floor(self, a: Dim, b: Dim) -> Dim:
        """a / b rounded down, where the result is a size."""
        exact = a.divided(b)
        if exact is not None:
            return exact
        if not b.symbols and b.coefficient > 0:
            base, offset = self._split(a)
            part = base.divided(b)
            if part is not None:
                return self.add(part, Dim.of(offset // b.coefficient))
        return self.memo(("/", a, b))

    def ceil(self, a: Dim, b: int) -> Dim:
        """a / b rounded up, where the result is a size."""
        return self.floor(self.add(a, Dim.of(b - 1)), Dim.of(b))

    def mod(self, a: Dim, b: Dim) -> Dim:
        """The remainder with the sign of b."""
        if a.divided(b) is not None:
            return ZERO
        if not a.symbols and not b.symbols and b.coefficient:
            return Dim.of(a.coefficient % b.coefficient)
        return self.memo(("%", a, b), self.is_size(b))

    def least(self, a: Dim, b: Dim) -> Dim:
        """min(a, b)"""
        low, high = self.span(a, b)
        if low >= 0 or high <= 0:
            return b if low >= 0 else a
        return self.memo(("min", *_ordered(a, b)), self.is_size(a) and self.is_size(b))

    def most(self, a: Dim, b: Dim) -> Dim:
        """max(a, b)"""
        low, high = self.span(a, b)
        if low >= 0 or high <= 0:
            return a if low >= 0 else b
        return self.memo(("max", *_ordered(a, b)), self.is_size(a) or self.is_size(b))

    def broadcast(self, a: Dim, b: Dim) -> Dim:
        """The size where two sizes meet: 1 gives way; of an integer and a symbol the integer is right, or the model fails."""
        if a == b or b == ONE:
            return a
        if a == ONE:
            return b
        if a.symbols and b.symbols:
            return self.memo(("broadcast", *_ordered(a, b)))
        return b if a.symbols else a
