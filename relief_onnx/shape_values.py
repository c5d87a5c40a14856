"""What small tensors hold, in symbols: a table of the operators that exporters calculate shapes with.

A rule takes a Step whose output sizes are noted already and returns the first output's content, or a list for all outputs; None where
it is not known. Contents are whole numbers. Those of float tensors are kept as long as they stay whole, as in Cast -> Mul -> Cast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
from onnx import numpy_helper

from relief_onnx.dims import ONE, ZERO, Dim, Symbols, product
from relief_onnx.shape_rules import folded_axes, slices
from relief_onnx.shape_scope import BOOLS, FLOATING, INTEGERS, LARGEST_CONTENT, LARGEST_EXACT, Content, Step, filled, known, read, static

__all__ = ["VALUE_RULES", "ValueRule"]

ValueRule = Callable[[Step], Content | list[Content | None] | None]
Pairwise = Callable[[Symbols, Dim, Dim], Dim]


def _contents(step: Step) -> list[Content] | None:
    found = []
    for slot in range(step.count):
        content = step.content(slot)
        if content is None:
            return None
        found.append(content)
    return found


def _map(function: Callable[..., Dim | None], *contents: Content) -> Content | None:
    """Entry by entry with broadcasting; None where one entry is not known or the result is large."""
    shape = np.broadcast_shapes(*(content.shape for content in contents))
    if np.prod(shape, dtype=int) > LARGEST_CONTENT:
        return None
    entries = [function(*row) for row in zip(*(np.broadcast_to(content, shape).flat for content in contents), strict=True)]
    return None if None in entries else filled(shape, entries)


def _fold(function: Pairwise) -> ValueRule:
    """An operator on any number of inputs."""

    def rule(step: Step) -> Content | None:
        contents: list[Content] | None = _contents(step)
        if not contents:
            return None
        result: Content | None = contents[0]
        for content in contents[1:]:
            result = None if result is None else _map(lambda a, b: function(step.symbols, a, b), result, content)
        return result

    return rule


def _each(function: Callable[[Symbols, Dim], Dim | None]) -> ValueRule:
    """An operator on one input."""

    def rule(step: Step) -> Content | None:
        content = step.content()
        return None if content is None else _map(lambda a: function(step.symbols, a), content)

    return rule


def _divide(step: Step) -> Content | None:
    contents = _contents(step)
    if contents is None:
        return None
    if step.kind() in INTEGERS:
        return _map(step.symbols.div, *contents)
    return _map(lambda a, b: a.divided(b), *contents)


def _power(step: Step) -> Content | None:
    """Known numbers to a known power (1369 ** 0.5 is how some exporters find a side), where the result is whole."""
    base, exponent = step.content(0), step.scope.array(step.node.input[1])
    if base is None or exponent is None or exponent.size != 1:
        return None

    def one(a: Dim) -> Dim | None:
        value = None if a.value is None or a.value < 0 else float(a.value) ** float(exponent.item())
        return Dim.of(int(value)) if value is not None and value == int(value) and value <= LARGEST_EXACT else None

    return _map(one, base)


def _modulo(step: Step) -> Content | None:
    contents = _contents(step)
    if contents is None or (step.attributes.get("fmod", 0) and not all(step.symbols.is_size(a) for row in contents for a in row.flat)):
        return None
    return _map(step.symbols.mod, *contents)


def _compare(name: str, true: Callable[[float, float], bool], false: Callable[[float, float], bool]) -> ValueRule:
    """A comparison; `true` and `false` decide from the least and the largest difference of the two sides."""

    def one(symbols: Symbols, a: Dim, b: Dim) -> Dim:
        span = symbols.span(a, b)
        return ONE if true(*span) else ZERO if false(*span) else symbols.memo((name, a, b))

    return _fold(one)


def _and(symbols: Symbols, a: Dim, b: Dim) -> Dim:
    if ZERO in (a, b):
        return ZERO
    return b if a == ONE else a if b in (ONE, a) else symbols.memo(("and", a, b))


def _or(symbols: Symbols, a: Dim, b: Dim) -> Dim:
    if ONE in (a, b):
        return ONE
    return b if a == ZERO else a if b in (ZERO, a) else symbols.memo(("or", a, b))


def _not(symbols: Symbols, a: Dim) -> Dim:
    return symbols.memo(("not", a)) if a.symbols else Dim.of(int(not a.coefficient))


def _absolute(symbols: Symbols, a: Dim) -> Dim:
    if symbols.is_size(a):
        return a
    return Dim(-a.coefficient, a.symbols) if symbols.is_size(Dim(1, a.symbols)) else symbols.memo(("abs", a))


def _where(step: Step) -> Content | None:
    condition, a, b = step.content(0), step.content(1), step.content(2)
    if a is None or b is None:
        return None
    if condition is None:
        sizes = static(step.dims(0))
        if sizes is None:
            return None
        condition = filled(sizes, (step.symbols.fresh() for _ in range(int(np.prod(sizes)))))

    def choose(test: Dim, yes: Dim, no: Dim) -> Dim:
        if yes == no or not test.symbols:
            return yes if test.symbols or test.coefficient else no
        return step.symbols.memo(("where", test, yes, no), step.symbols.is_size(yes) and step.symbols.is_size(no))

    return _map(choose, condition, a, b)


def _cast(step: Step) -> Content | None:
    content, kind = step.content(), step.attributes["to"]
    if content is None:
        return None
    if kind in BOOLS:
        return _map(lambda a: None if a.symbols else Dim.of(int(a != ZERO)), content)
    largest = LARGEST_EXACT if kind in FLOATING else (1 << 31) - 1 if kind != step.kind() else (1 << 63) - 1
    return content if all(a.symbols or abs(a.coefficient) <= largest for a in content.flat) else None


def _shape(step: Step) -> Content | None:
    dims = step.dims()
    if dims is None:
        return None
    row = dims[step.attributes.get("start", 0) : step.attributes.get("end")]
    return filled((len(row),), row)


def _size(step: Step) -> Content | None:
    dims = step.dims()
    return None if dims is None else filled((), [product(dims)])


def _again(step: Step) -> Content | None:
    """The same entries in another shape."""
    content, sizes = step.content(), static(step.output())
    return None if content is None or sizes is None else content.reshape(sizes)


def _identity(step: Step) -> Content | None:
    return step.content()


def _transpose(step: Step) -> Content | None:
    content = step.content()
    return None if content is None else content.transpose(step.attributes.get("perm"))


def _gather(step: Step) -> Content | None:
    indices = step.content(1)
    numbers, data = known(indices), step.content(0)
    if indices is None or numbers is None or data is None:
        return None
    return np.asarray(np.take(data, np.array(numbers, int).reshape(indices.shape), axis=step.attributes.get("axis", 0)), object)


def _slice(step: Step) -> Content | None:
    content, rows = step.content(), slices(step)
    if content is None or rows is None or any(bound.symbols for row in rows for bound in row[1:]):
        return None
    index = [slice(None)] * content.ndim
    for axis, start, end, stride in rows:
        index[axis] = slice(start.coefficient, end.coefficient, stride.coefficient)
    return content[tuple(index)]


def _concat(step: Step) -> Content | None:
    contents = _contents(step)
    return None if contents is None else np.concatenate(contents, axis=step.attributes["axis"])


def _split(step: Step) -> list[Content | None]:
    content, parts = step.content(), [static(step.output(slot)) for slot in range(len(step.node.output))]
    axis = step.attributes.get("axis", 0)
    lengths = [part[axis] for part in parts if part is not None]
    if content is None or len(lengths) < len(parts):
        return [None] * len(parts)
    return list(np.split(content, np.cumsum(lengths)[:-1], axis=axis))


def _expand(step: Step) -> Content | None:
    content, sizes = step.content(), static(step.output())
    return None if content is None or sizes is None else np.broadcast_to(content, sizes)


def _tile(step: Step) -> Content | None:
    content, repeats = step.content(), known(step.content(1))
    return None if content is None or repeats is None or static(step.output()) is None else np.tile(content, repeats)


def _range(step: Step) -> Content | None:
    contents, sizes = _contents(step), static(step.output())
    if contents is None or sizes is None:
        return None
    start, _, stride = (content.reshape(-1)[0] for content in contents)
    return filled(sizes, (step.symbols.add(start, stride * Dim.of(number)) for number in range(sizes[0])))


def _constants(step: Step) -> Content | None:
    sizes, value = static(step.output()), step.attributes.get("value")
    if sizes is None:
        return None
    content = read(np.zeros(1) if value is None else numpy_helper.to_array(value))
    return None if content is None else filled(sizes, [content.reshape(-1)[0]] * int(np.prod(sizes)))


def _folding(function: Pairwise, empty: Dim | None) -> ValueRule:
    """A Reduce operator."""

    def rule(step: Step) -> Content | None:
        content, sizes = step.content(), static(step.output())
        axes = None if content is None else folded_axes(step, content.ndim)
        if content is None or sizes is None or axes is None:
            return None
        if not axes:
            return content
        rest = [axis for axis in range(content.ndim) if axis not in axes]
        rows = content.transpose(rest + axes).reshape(int(np.prod(sizes)), -1)
        if not rows.shape[1] and empty is None:
            return None
        return filled(sizes, (reduce(lambda a, b: function(step.symbols, a, b), row or [empty]) for row in rows.tolist()))

    return rule


def _times(symbols: Symbols, a: Dim, b: Dim) -> Dim:
    return a * b


def _unchanged(symbols: Symbols, a: Dim) -> Dim:
    return a


VALUE_RULES: dict[str, ValueRule] = {
    "Shape": _shape, "Size": _size, "Identity": _identity, "Cast": _cast, "Gather": _gather, "Slice": _slice, "Concat": _concat,
    "Split": _split, "Squeeze": _again, "Unsqueeze": _again, "Reshape": _again, "Flatten": _again, "Transpose": _transpose,
    "Expand": _expand, "Tile": _tile, "Range": _range, "ConstantOfShape": _constants, "Where": _where,
    "Add": _fold(Symbols.add), "Sub": _fold(Symbols.sub), "Mul": _fold(_times), "Div": _divide, "Mod": _modulo,
    "Pow": _power,
    "Min": _fold(Symbols.least), "Max": _fold(Symbols.most), "Sum": _fold(Symbols.add),
    "Floor": _each(_unchanged), "Ceil": _each(_unchanged), "Round": _each(_unchanged), "Abs": _each(_absolute), "Not": _each(_not),
    "Neg": _each(lambda symbols, a: Dim(-a.coefficient, a.symbols)), "And": _fold(_and), "Or": _fold(_or),
    "Equal": _compare("=", lambda low, high: low == high == 0, lambda low, high: low > 0 or high < 0),
    "Less": _compare("<", lambda low, high: high < 0, lambda low, high: low >= 0),
    "LessOrEqual": _compare("<=", lambda low, high: high <= 0, lambda low, high: low > 0),
    "Greater": _compare(">", lambda low, high: low > 0, lambda low, high: high <= 0),
    "GreaterOrEqual": _compare(">=", lambda low, high: low >= 0, lambda low, high: high < 0),
    "ReduceProd": _folding(_times, ONE), "ReduceSum": _folding(Symbols.add, ZERO), "ReduceMax": _folding(Symbols.most, None),
    "ReduceMin": _folding(Symbols.least, None),
}  # fmt: skip
