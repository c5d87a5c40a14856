"""How the positions of kept weights are written, and the standard operators that read them back.

A weight is seen as `blocks` x `unit` elements; a block is dropped only if all its elements are zero. A codec turns the
rising positions of the kept blocks into small integer arrays (numpy), back again (numpy), and into ONNX nodes that give
the dense tensor. With p = kept / blocks, a position costs at least H(p) / p bits, H the binary entropy.

    bitmask  1 / p bits: best where a fifth or more is kept. A running sum gives each kept block its row of the values.
    gaps     the distance to the previous position, as a digit of an int64 word in the base that costs least. A distance
             too long for a digit passes over fillers, zeros stored as values. Best below a fifth.
    gaps8    gaps in base 256, one byte each. Fewer nodes, so it wins for small or very sparse weights.

onnxruntime folds these operators when their inputs are constant. From 1.27 on it folds neither NonZero nor Compress,
whose output shape depends on values, so nothing here selects. Before opset 11 there is no CumSum: sums run through
products with a triangular matrix of width 64, in float32, which counts exactly up to 2^24 blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CODECS", "Codec", "Emitter", "Encoded", "Positions"]

Positions = NDArray[np.int64]
Pieces = Mapping[str, NDArray[Any]]

_WORD_LIMIT = 2**63  # a word is a non-negative int64
_CUMSUM = 11  # first opset with CumSum, BitShift and ScatterND
_ROW = 64  # width of the triangular products before that
_FLOAT_EXACT = 2**24


class Emitter:
    """Collects the initializers and nodes that rebuild one weight; every name starts with `prefix`."""

    def __init__(self, prefix: str, opset: int, data_type: int, fill: bytes) -> None:
        """fill: what every element of a dropped block is, as it is stored."""
        self.prefix = prefix
        self.opset = opset
        self.data_type = data_type
        self.fill = fill
        self.initializers: list[TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []

    def name(self, label: str) -> str:
        return f"{self.prefix}/{label}"

    def const(self, label: str, values: NDArray[Any]) -> str:
        """Store an integer array as an initializer; returns its name."""
        self.initializers.append(numpy_helper.from_array(values, self.name(label)))
        return self.name(label)

    def tensor(self, label: str, raw: bytes, dims: tuple[int, ...]) -> str:
        """Store raw little-endian elements of the weight's own type as an initializer; returns its name."""
        tensor = TensorProto(name=self.name(label), data_type=self.data_type, dims=dims, raw_data=raw)
        self.initializers.append(tensor)
        return tensor.name

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        result = output or self.name(str(len(self.nodes)))
        self.nodes.append(helper.make_node(op, list(inputs), [result], **attributes))
        return result

    def reshape(self, tensor: str, label: str, dims: tuple[int, ...], output: str | None = None) -> str:
        return self.node("Reshape", tensor, self.const(label, np.array(dims, np.int64)), output=output)

    def modulo(self, tensor: str, divisor: str) -> str:
        """Remainder of non-negative integers."""
        if self.opset >= 10:
            return self.node("Mod", tensor, divisor)
        return self.node("Sub", tensor, self.node("Mul", self.node("Div", tensor, divisor), divisor))

    def head(self, tensor: str, rows: int) -> str:
        """The first `rows` along axis 0."""
        if self.opset < 10:
            return self.node("Slice", tensor, axes=[0], starts=[0], ends=[rows])
        number = len(self.nodes)  # one weight may need several cuts
        start = self.const(f"from{number}", np.array([0], np.int64))
        return self.node("Slice", tensor, start, self.const(f"to{number}", np.array([rows], np.int64)))


@dataclass(frozen=True)
class Encoded:
    """What is stored of the positions.

    `positions` [m] rise: the kept blocks and the fillers; `pieces` lie beside the values; `base` of the digits or 0.
    """

    positions: Positions
    pieces: Pieces
    base: int = 0


@dataclass(frozen=True)
class Codec:
    """One way to store positions; opset `first` and later have the operators that `build` uses.

    encode(positions [kept], blocks, bytes per block) -> Encoded, or None where the codec cannot hold them.
    decode(pieces, base) -> positions [m].
    build(emitter, encoded, name of the values [m, unit], blocks, unit) -> name of the dense elements, in any shape.
    """

    name: str
    first: int
    encode: Callable[[Positions, int, int], Encoded | None]
    decode: Callable[[Pieces, int], Positions]
    build: Callable[[Emitter, Encoded, str, int, int], str]

    def usable(self, opset: int, blocks: int) -> bool:
        """Whether `opset` can rebuild a weight of so many blocks."""
        return opset >= self.first and (opset >= _CUMSUM or blocks <= _FLOAT_EXACT)


# ---- running sums


def _emit_running_sum(e: Emitter, counts: str, rows: int, to: int) -> str:
    """Integers [rows, 1] of type `to` -> their inclusive sums, same shape and type."""
    if e.opset >= _CUMSUM:
        return e.node("CumSum", counts, e.const("axis", np.array(0, np.int32)))
    triangle = _emit_triangle(e)
    before = _emit_sum_before(e, e.node("Cast", counts, to=TensorProto.FLOAT), triangle, rows)
    return e.node("Add", e.node("Cast", before, to=to), counts)


def _emit_triangle(e: Emitter) -> str:
    """float [_ROW, _ROW], 1 where row < column."""
    column = e.node("Cast", e.const("steps", np.arange(_ROW, dtype=np.uint8)), to=TensorProto.FLOAT)
    row = e.reshape(column, "column", (_ROW, 1))
    return e.node("Cast", e.node("Greater", column, row), to=TensorProto.FLOAT)


def _emit_sum_before(e: Emitter, counts: str, triangle: str, rows: int) -> str:
    """float [rows, 1] -> the sum of all rows before each one, same shape."""
    lines = -(-rows // _ROW)
    padded = e.node("Pad", counts, pads=[0, 0, lines * _ROW - rows, 0])
    grid = e.reshape(padded, f"grid{lines}", (lines, _ROW))
    before = e.node("MatMul", grid, triangle)
    if lines > 1:
        totals = e.node("ReduceSum", grid, axes=[1], keepdims=1)
        before = e.node("Add", before, _emit_sum_before(e, totals, triangle, lines))
    return e.head(e.reshape(before, f"line{lines}", (-1, 1)), rows)


# ---- bitmask


def _encode_bitmask(positions: Positions, blocks: int, block_bytes: int) -> Encoded | None:
    bits = np.zeros(blocks, np.bool_)
    bits[positions] = True
    return Encoded(positions, {"bits": np.packbits(bits)[:, None]})


def _decode_bitmask(pieces: Pieces, base: int) -> Positions:
    return np.flatnonzero(np.unpackbits(pieces["bits"])).astype(np.int64, copy=False)


def _build_bitmask(e: Emitter, encoded: Encoded, values: str, blocks: int, unit: int) -> str:
    bits = e.reshape(_emit_bits(e, encoded.pieces["bits"]), "flat", (-1, 1))
    if blocks % 8:
        bits = e.head(bits, blocks)
    if e.opset >= _CUMSUM:
        bits = e.node("Cast", bits, to=TensorProto.INT32)
    # row 0 of the table is zero; kept block number i reads row i + 1
    rank = e.node("Mul", _emit_running_sum(e, bits, blocks, TensorProto.INT32), bits)
    zero = e.tensor("zero", e.fill * unit, (1, unit))
    return e.node("Gather", e.node("Concat", zero, values, axis=0), rank, axis=0)


def _emit_bits(e: Emitter, packed: NDArray[Any]) -> str:
    """uint8 [bytes, 1], highest bit first -> 0 or 1 [bytes, 8]: uint8, or int32 where BitShift is missing."""
    source = e.const("bits", packed)
    if e.opset >= _CUMSUM:
        shifts = e.const("shifts", np.arange(7, -1, -1).astype(np.uint8))
        shifted = e.node("BitShift", source, shifts, direction="RIGHT")
        return e.modulo(shifted, e.const("two", np.array(2, np.uint8)))
    wide = e.node("Cast", source, to=TensorProto.INT32)
    powers = (2 ** np.arange(7, -1, -1)).astype(np.int32)
    shifted = e.node("Div", wide, e.const("powers", powers))
    return e.modulo(shifted, e.const("two", np.array(2, np.int32)))


# ---- gaps


def _gaps(positions: Positions) -> Positions:
    return np.diff(positions, prepend=0)


def _fill(positions: Positions, longest: int) -> Positions:
    """Add fillers so that no gap is above `longest`."""
    gaps = _gaps(positions)
    steps = np.maximum((gaps - 1) // longest, 0)  # fillers on the way to each position
    ordinal = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps)
    fillers = np.repeat(positions - gaps, steps) + longest * (ordinal + 1)
    return np.sort(np.concatenate([positions, fillers]), kind="stable")


def _pad(positions: Positions, blocks: int, multiple: int) -> Positions | None:
    """Add the first positions that are not kept until a whole `multiple` is kept; None where too few are left."""
    missing = -len(positions) % multiple
    if missing > blocks - len(positions):
        return None
    free = np.setdiff1d(np.arange(min(blocks, len(positions) + missing)), positions, assume_unique=True)
    return np.sort(np.concatenate([positions, free[:missing]]), kind="stable")


def _widest_base(digits: int) -> int:
    """The largest base of which `digits` digits fit a word."""
    base = int(_WORD_LIMIT ** (1 / digits)) + 1
    while base**digits > _WORD_LIMIT:
        base -= 1
    return base


# (digits per word, base): any other base wastes part of the word
_BASES = tuple((digits, _widest_base(digits)) for digits in range(63, 1, -1))


def _encode_gaps(positions: Positions, blocks: int, block_bytes: int) -> Encoded | None:
    lengths = np.bincount(_gaps(positions))
    gaps = np.flatnonzero(lengths)
    counts = lengths[gaps]

    def cost(row: tuple[int, int]) -> int:
        digits, base = row
        fillers = int(counts @ np.maximum((gaps - 1) // (base - 1), 0))
        words = -(-(len(positions) + fillers) // digits)
        return 8 * (words + digits) + (words * digits - len(positions)) * block_bytes

    digits, base = min(_BASES, key=cost)
    filled = _pad(_fill(positions, base - 1), blocks, digits)
    if filled is None:
        return None
    powers = base ** np.arange(digits, dtype=np.int64)
    words = (_gaps(filled).reshape(-1, digits) * powers).sum(axis=1, keepdims=True)
    return Encoded(filled, {"words": words, "powers": powers}, base)


def _decode_gaps(pieces: Pieces, base: int) -> Positions:
    positions: Positions = np.cumsum(pieces["words"] // pieces["powers"] % base, dtype=np.int64)
    return positions


def _build_gaps(e: Emitter, encoded: Encoded, values: str, blocks: int, unit: int) -> str:
    words, powers = (e.const(label, encoded.pieces[label]) for label in ("words", "powers"))
    digits = e.modulo(e.node("Div", words, powers), e.const("base", np.array(encoded.base, np.int64)))
    return _emit_scatter(e, e.reshape(digits, "flat", (-1, 1)), values, len(encoded.positions), blocks, unit)


def _encode_gaps8(positions: Positions, blocks: int, block_bytes: int) -> Encoded | None:
    filled = _fill(positions, 255)
    return Encoded(filled, {"gaps": _gaps(filled).astype(np.uint8)[:, None]})


def _decode_gaps8(pieces: Pieces, base: int) -> Positions:
    return np.cumsum(pieces["gaps"], dtype=np.int64)


def _build_gaps8(e: Emitter, encoded: Encoded, values: str, blocks: int, unit: int) -> str:
    gaps = e.node("Cast", e.const("gaps", encoded.pieces["gaps"]), to=TensorProto.INT64)
    return _emit_scatter(e, gaps, values, len(encoded.positions), blocks, unit)


def _emit_scatter(e: Emitter, gaps: str, values: str, count: int, blocks: int, unit: int) -> str:
    """gaps int64 [m, 1], values [m, unit] -> dense [blocks, unit]."""
    indices = _emit_running_sum(e, gaps, count, TensorProto.INT64)
    zeros = _emit_zeros(e, blocks, unit)
    if e.opset >= _CUMSUM:
        return e.node("ScatterND", zeros, indices, values)
    if unit > 1:
        indices = e.node("Expand", indices, e.const("wide", np.array([count, unit], np.int64)))
    return e.node("Scatter", zeros, indices, values, axis=0)


def _emit_zeros(e: Emitter, blocks: int, unit: int) -> str:
    shape = e.const("zeros", np.array([blocks, unit], np.int64))
    if e.data_type == TensorProto.FLOAT:
        return e.node("ConstantOfShape", shape)
    if e.data_type == TensorProto.BFLOAT16:  # ConstantOfShape has it only from opset 20 on
        return e.node("Cast", e.node("ConstantOfShape", shape), to=e.data_type)
    return e.node("ConstantOfShape", shape, value=TensorProto(data_type=e.data_type, dims=[1], raw_data=e.fill))


CODECS: tuple[Codec, ...] = (
    Codec("bitmask", 7, _encode_bitmask, _decode_bitmask, _build_bitmask),
    Codec("gaps", 9, _encode_gaps, _decode_gaps, _build_gaps),
    Codec("gaps8", 9, _encode_gaps8, _decode_gaps8, _build_gaps8),
)
