"""What is known about the tensors of a graph while shapes are inferred, and one node as the rules see it."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.aside import array_of
from relief_onnx.dims import Dim, Symbols, product
from relief_onnx.nodes import STANDARD

__all__ = ["BOOLS", "FLOATING", "INTEGERS", "LARGEST_CONTENT", "Content", "Dims", "Scope", "Step", "filled", "known", "read", "static"]

Dims = tuple[Dim, ...]
# The symbolic content of a small tensor: an object array of Dim with the tensor's shape; false and true are 0 and 1.
Content = NDArray[Any]

INTEGERS = frozenset({TensorProto.INT64, TensorProto.INT32})
BOOLS = frozenset({TensorProto.BOOL})
FLOATING = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE})
LARGEST_CONTENT = 64
# Whole numbers up to here are exact in float32.
LARGEST_EXACT = 1 << 24


def known(content: Content | None) -> list[int] | None:
    """The entries as integers, or None where one is not known."""
    if content is None:
        return None
    values = [entry.value for entry in content.flat]
    return None if None in values else [value for value in values if value is not None]


def filled(shape: tuple[int, ...], entries: Iterable[Dim | None]) -> Content:
    """A content of that shape, from its entries in a row."""
    content = np.empty(math.prod(shape), object)
    content[:] = list(entries)
    return content.reshape(shape)


def static(dims: Dims | None) -> tuple[int, ...] | None:
    """Sizes as integers, where they are known and few entries lie within."""
    if dims is None or any(size.symbols for size in dims) or not 0 <= product(dims).coefficient <= LARGEST_CONTENT:
        return None
    return tuple(size.coefficient for size in dims)


def read(array: NDArray[Any]) -> Content | None:
    """An array's content; None where it is large or holds fractions."""
    if array.size > LARGEST_CONTENT or array.dtype.kind not in "iubf":
        return None
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
        if not np.all((np.abs(array) <= LARGEST_EXACT) & (array == np.floor(array))):
            return None
    return filled(array.shape, (Dim.of(int(value)) for value in array.flat))


class Scope:
    """Types, sizes and contents by tensor name; a body sees those of the graphs around it."""

    def __init__(self, symbols: Symbols, opsets: Mapping[str, int], parent: Scope | None = None) -> None:
        self.symbols = symbols
        self.opsets = opsets
        self.parent = parent
        self.arguments: Mapping[str, onnx.AttributeProto] = parent.arguments if parent else {}
        self.types: MutableMapping[str, int] = {} if parent is None else ChainMap({}, parent.types)
        self.dims: MutableMapping[str, Dims | None] = {} if parent is None else ChainMap({}, parent.dims)
        self.contents: MutableMapping[str, Content | None] = {} if parent is None else ChainMap({}, parent.contents)
        self.constants: MutableMapping[str, TensorProto] = {} if parent is None else ChainMap({}, parent.constants)
        # Sequences, maps and optionals, which have no shape.
        self.others: MutableMapping[str, onnx.TypeProto] = {} if parent is None else ChainMap({}, parent.others)

    def array(self, name: str) -> NDArray[Any] | None:
        """The value of a small initializer or Constant node."""
        item = self.constants.get(name)
        if item is None or item.data_location == TensorProto.EXTERNAL or product(map(Dim.of, item.dims)).coefficient > LARGEST_CONTENT:
            return None
        return array_of(item)

    def content(self, name: str, invent: bool = False) -> Content | None:
        """A tensor's content; with `invent`, integers that are computed out of sight are symbols, the same at every reading."""
        if name not in self.contents:
            array = self.array(name)
            self.contents[name] = None if array is None else read(array)
        found = self.contents[name]
        if found is None and invent and self.types.get(name) in INTEGERS:
            sizes = static(self.dims.get(name))
            if sizes is not None:
                found = filled(sizes, (self.symbols.fresh(size=False) for _ in range(math.prod(sizes))))
                self.contents[name] = found
        return found

    def declare(self, name: str, kind: int, dims: Dims | None) -> None:
        """Note what is known about a tensor."""
        if kind:
            self.types[name] = kind
        self.dims[name] = dims
        if dims and self.parent is None:
            # A negative size would stop the model. Not so in a body, which may never run.
            self.symbols.sizes.update(symbol for size in dims for symbol in size.symbols)


class Step:
    """A node with what is known about its inputs."""

    def __init__(self, node: onnx.NodeProto, scope: Scope) -> None:
        self.node = node
        self.scope = scope
        self.symbols = scope.symbols
        self.count = len(node.input)
        self.operator = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """By name; of a function's node also those that its caller gives."""
        found = {}
        for item in self.node.attribute:
            given = self.scope.arguments.get(item.ref_attr_name) if item.ref_attr_name else item
            if given is not None:
                value = helper.get_attribute_value(given)
                found[item.name] = value.decode() if isinstance(value, bytes) else value
        return found

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return self.scope.opsets.get("", 1)

    def has(self, slot: int) -> bool:
        """Whether that input is given."""
        return slot < self.count and bool(self.node.input[slot])

    def dims(self, slot: int = 0) -> Dims | None:
        """Sizes of an input, or None where its rank is not known."""
        return self.scope.dims.get(self.node.input[slot]) if self.has(slot) else None

    def kind(self, slot: int = 0) -> int:
        """Element type of an input, 0 where it is not known."""
        return self.scope.types.get(self.node.input[slot], 0) if self.has(slot) else 0

    def content(self, slot: int = 0) -> Content | None:
        """What an input holds."""
        return self.scope.content(self.node.input[slot], invent=True) if self.has(slot) else None

    def vector(self, slot: int) -> list[Dim] | None:
        """What an input holds, in a row."""
        content = self.content(slot)
        return None if content is None else list(content.flat)

    def integers(self, slot: int, attribute: str = "") -> list[int] | None:
        """The integers of an input or, where it is absent, of an attribute; None where they are not known."""
        if self.has(slot):
            return known(self.content(slot))
        value = self.attributes.get(attribute)
        return None if value is None else [int(item) for item in np.atleast_1d(value)]

    def given(self, slot: int, attribute: str = "") -> bool:
        """Whether the input or the attribute is there."""
        return self.has(slot) or attribute in self.attributes

    def fresh(self, rank: int) -> Dims:
        """Sizes of which nothing is known."""
        return tuple(self.symbols.fresh() for _ in range(rank))

    def output(self, slot: int = 0) -> Dims | None:
        """Sizes of an output, once they are noted."""
        return self.scope.dims.get(self.node.output[slot])
