"""The form of the operator table: rows from (domain, operator, since version) to a plain function.

The parameters of a function are what ONNX names them: inputs in their order, attributes as keywords with the standard's defaults. What was
an attribute first and an input later (the axes of Squeeze) is one parameter, so most operators need one row for all versions.

A function may also ask for `outputs` (how many outputs the node has), `state` (is the network training?), `opset`, and `updates` (are the
node's running statistics initializers that training may change?).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Mode", "Row", "Table"]

Function = Callable[..., Any]
Check = Callable[[Mapping[str, Any]], str | None]


@dataclass
class Mode:
    """Whether the network is training; one object for all nodes of a network."""

    training: bool = False


@dataclass(frozen=True)
class Row:
    """How one operator is run from version `since` on.

    host: input slots that the function wants as Python numbers or lists of them (axes, shapes, sizes).
    either: slots that it takes as Python numbers where they are the same in every run, and as tensors where they are not.
    frozen: slots whose float initializers are no weights (exponents, scales of quantisation).
    statistics: slots of running statistics, which training updates in place.
    check: what about a node's attributes cannot be run, or None.
    absent: input slots that the standard has and the function lacks.
    pure: the same inputs give the same outputs, so that a node of constants can be computed once.
    """

    function: Function
    since: int = 1
    host: frozenset[int] = frozenset()
    either: frozenset[int] = frozenset()
    frozen: frozenset[int] = frozenset()
    statistics: frozenset[int] = frozenset()
    check: Check | None = None
    absent: frozenset[int] = frozenset()
    pure: bool = True

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The function's parameters by name; none where Python cannot see them (functions of torch itself)."""
        try:
            return inspect.signature(self.function).parameters
        except ValueError:
            return {}

    @cached_property
    def asked(self) -> frozenset[str]:
        """The keywords of the function."""
        return frozenset(name for name, item in self.parameters.items() if item.kind is inspect.Parameter.KEYWORD_ONLY)

    @cached_property
    def inputs(self) -> int | None:
        """How many inputs the function takes at most; None where any number, or where Python cannot see it."""
        kinds = [item.kind for item in self.parameters.values()]
        if not kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
            return None
        return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


class Table:
    """Rows by (domain, operator)."""

    def __init__(self, *parts: Table) -> None:
        self.rows: dict[tuple[str, str], list[Row]] = {}
        for part in parts:
            for key, rows in part.rows.items():
                self.rows.setdefault(key, []).extend(rows)

    def op(
        self,
        *names: str,
        since: int = 1,
        domain: str = "",
        host: tuple[int, ...] = (),
        either: tuple[int, ...] = (),
        frozen: tuple[int, ...] = (),
        statistics: tuple[int, ...] = (),
        check: Check | None = None,
        absent: tuple[int, ...] = (),
        pure: bool = True,
    ) -> Callable[[Function], Function]:
        """A decorator that adds a row for each name; the fields are those of Row."""

        def add(function: Function) -> Function:
            row = Row(
                function,
                since,
                frozenset(host),
                frozenset(either),
                frozenset(frozen),
                frozenset(statistics),
                check,
                frozenset(absent),
                pure,
            )
            for name in names:
                self.rows.setdefault((domain, name), []).append(row)
            return function

        return add

    def find(self, domain: str, name: str, opset: int) -> Row | None:
        """The row in force at an opset, or None."""
        rows = [row for row in self.rows.get((domain, name), ()) if row.since <= opset]
        return max(rows, key=lambda row: row.since, default=None)
