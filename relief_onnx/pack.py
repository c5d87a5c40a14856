"""Sparse weights in fewer bytes: kept values and their positions as initializers, rebuilt by standard ONNX operators.

The dense weight keeps its name: it becomes the output of the last decode node, so no consumer changes. onnxruntime
folds the decode nodes at load (graph optimisation BASIC and up); with optimisation disabled they run at each call, with
the same result. Opset and operators stay standard. Per tensor the smallest of all codecs and of the dense initializer
is chosen, by serialized bytes with nodes and names. -0.0 counts as zero and becomes +0.0 where its block is dropped.

The last decode node has the weight as its output, is named `p<number>/packed` and carries in its doc_string what `unpack` needs, as JSON.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from relief_onnx.aside import array_of, is_aside, like, wire_size
from relief_onnx.codecs import CODECS, Codec, Emitter
from relief_onnx.errors import ModelError

__all__ = ["PackedTensor", "entropy_bound", "pack", "packed_names", "unpack"]

_FORMAT = "relief-onnx/packed/1"
_MARK = "packed"  # label of the last decode node
_FOLD_LIMIT = 2**30  # onnxruntime, from 1.27 on, folds no node whose output has more bytes


@dataclass(frozen=True)
class _DataType:
    """How a value type lies in a TensorProto; elements are handled as unsigned `bits`, so that NaN and -0.0 survive."""

    bits: str  # numpy type string, little-endian
    typed: str  # numpy type string of the elements of `field`
    field: str
    first_opset: int = 1
    has_sign_bit: bool = True  # the highest bit alone is -0.0, a zero too


_DATA_TYPES: Mapping[int, _DataType] = {
    TensorProto.FLOAT: _DataType("<u4", "<f4", "float_data"),
    TensorProto.DOUBLE: _DataType("<u8", "<f8", "double_data"),
    TensorProto.FLOAT16: _DataType("<u2", "<u2", "int32_data"),
    TensorProto.BFLOAT16: _DataType("<u2", "<u2", "int32_data", first_opset=13),
    TensorProto.INT8: _DataType("<u1", "<i1", "int32_data", has_sign_bit=False),
    TensorProto.UINT8: _DataType("<u1", "<u1", "int32_data", has_sign_bit=False),
    TensorProto.INT16: _DataType("<u2", "<i2", "int32_data", has_sign_bit=False),
    TensorProto.UINT16: _DataType("<u2", "<u2", "int32_data", has_sign_bit=False),
}


@dataclass(frozen=True)
class PackedTensor:
    """How one weight is stored, and why.

    `storage` is "dense" or a codec ("bitmask", "gaps", "gaps8"), with the prefix "kernel-" where whole blocks are kept
    or dropped. `dense_bytes` and `packed_bytes` are serialized bytes, nodes and names included.
    `entropy_bytes` is the lowest entropy bound over the unit lengths that were tried.
    """

    name: str
    storage: str
    dense_bytes: int
    packed_bytes: int
    entropy_bytes: float
    reason: str


@dataclass(frozen=True)
class _Candidate:
    storage: str
    emitter: Emitter
    bytes: int


def entropy_bound(kept: int, blocks: int, block_bits: int) -> float:
    """Bytes that `kept` of `blocks` blocks of `block_bits` bits need when their positions are random."""
    p = kept / blocks if blocks else 0.0
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
    return (kept * block_bits + blocks * entropy) / 8


def pack(model: onnx.ModelProto, weights: Mapping[str, int] | Sequence[str]) -> tuple[onnx.ModelProto, tuple[PackedTensor, ...]]:
    """Store sparse weights compactly; returns a new model and one row per name in `weights`, in their order.

    `weights` are initializers of the main graph. As a mapping it gives each one's unit length: how many consecutive
    innermost elements are zero or not zero together (kh * kw of a kernel [out, in, kh, kw]). As a sequence, the
    product of the axes after the second is tried. Single elements are tried in any case.
    A weight that is already packed is unpacked first. Below IR version 4 a model is raised to 4 when something is
    packed, and no initializer is listed in the graph's inputs any more.

    Raises ModelError where a name is not an initializer of the main graph or a unit length does not divide its size.
    """
    ir_version = _first_ir_version(model)
    # One weight remembers all inputs of an old file, so there all are packed anew together.
    again = [name for name in packed_names(model) if name not in weights] if ir_version < 4 else []
    source = _unpacked(model, {*weights, *again})
    index = {t.name: t for t in source.graph.initializer}
    units = {name: _unit(index, name, weights) for name in dict.fromkeys(weights)}
    units |= {name: _unit(index, name, again) for name in again}
    opset = _opset(source)
    outputs = {v.name for v in source.graph.output}
    names = _all_names(source.graph)
    rows: list[PackedTensor] = []
    chosen: dict[str, Emitter] = {}
    for number, (name, unit) in enumerate(units.items()):
        row, emitter = _choose(index[name], unit, opset, outputs, _free_prefix(number, names))
        rows += [row] if name in weights else []
        if emitter is not None:
            _mark(emitter, source, name, ir_version)
            chosen[name] = emitter
    return _apply(source, chosen), tuple(rows)


def unpack(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every packed weight as a dense initializer: the exact inverse of `pack`.

    A model without packed weights is returned equal. Raises ModelError where packed data is damaged.
    """
    return _unpacked(model, set(packed_names(model)))


def packed_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the weights that `pack` stored compactly, in the order of their decode nodes."""
    return tuple(node.output[0] for node, _ in _marks(model.graph))


# ---- choosing


def _unit(index: Mapping[str, TensorProto], name: str, weights: Mapping[str, int] | Sequence[str]) -> int:
    if name not in index:
        raise ModelError(f"Weight '{name}' is not an initializer of the model's main graph; pass names from graph.initializer.")
    dims = index[name].dims
    unit = weights[name] if isinstance(weights, Mapping) else math.prod(dims[2:])
    if isinstance(weights, Mapping) and (unit < 1 or math.prod(dims) % unit):
        raise ModelError(
            f"Unit length {unit} does not divide weight '{name}' of shape {list(dims)}; pass 1, or the number of elements of one kernel."
        )
    return max(unit, 1)


def _choose(tensor: TensorProto, unit: int, opset: int, outputs: set[str], prefix: str) -> tuple[PackedTensor, Emitter | None]:
    dense = _wire(tensor)

    def keep(reason: str, entropy: float = float(dense)) -> tuple[PackedTensor, None]:
        return PackedTensor(tensor.name, "dense", dense, dense, entropy, reason), None

    refusal = _refusal(tensor, opset, outputs)
    if refusal:
        return keep(refusal)
    bits = _bits(tensor)
    grids = [bits.reshape(-1, u) for u in sorted({1, unit})]
    has_sign_bit = _DATA_TYPES[tensor.data_type].has_sign_bit
    # Of integers the one that is there most often goes: the zero point, which need not be 0.
    fill = 0 if has_sign_bit or not bits.size else int(np.bincount(bits).argmax())
    kept = [_kept_blocks(grid ^ grid.dtype.type(fill), has_sign_bit) for grid in grids]
    width = 8 * bits.itemsize
    entropy = min(entropy_bound(len(k), len(g), g.shape[1] * width) for g, k in zip(grids, kept, strict=True))
    candidates = [c for g, k in zip(grids, kept, strict=True) for c in _candidates(tensor, prefix, opset, g, k, fill)]
    if not candidates:
        return keep(f"opset {opset} cannot rebuild a weight of {bits.size} elements; opset 11 or newer can", entropy)
    best = min(candidates, key=lambda c: c.bytes)
    if best.bytes >= dense:
        return keep(f"the smallest packed form, {best.storage}, needs {best.bytes} bytes, dense {dense}", entropy)
    others = sorted((c.bytes, c.storage) for c in candidates if c is not best)
    reason = "smallest: " + ", ".join(f"{s} {b}" for b, s in [(best.bytes, best.storage), *others, (dense, "dense")])
    best.emitter.initializers[:] = [like(item, tensor) for item in best.emitter.initializers]
    return PackedTensor(tensor.name, best.storage, dense, best.bytes, entropy, reason + " bytes"), best.emitter


def _refusal(tensor: TensorProto, opset: int, outputs: set[str]) -> str:
    """Why the tensor must stay as it is; empty if it need not."""
    data_type = _DATA_TYPES.get(tensor.data_type)
    type_name = TensorProto.DataType.Name(tensor.data_type)
    first = max(min(codec.first for codec in CODECS), data_type.first_opset if data_type else 0)
    checks = (
        (data_type is None, f"no packed form for values of type {type_name}"),
        (opset < first, f"opset {opset} cannot rebuild it; opset {first} or newer can, for values of type {type_name}"),
        (not tensor.dims, "it is a scalar"),
        (0 in tensor.dims, "it is empty"),
        (_largest_output(tensor) > _FOLD_LIMIT, "it is above 1 GiB, which onnxruntime would rebuild at each call"),
        (tensor.data_location == TensorProto.EXTERNAL and not is_aside(tensor), "its external data is not loaded"),
        (tensor.name in outputs, "it is an output of the graph"),
    )
    return next((reason for refused, reason in checks if refused), "")


def _largest_output(tensor: TensorProto) -> int:
    """Bytes of the largest tensor that a decode node writes: the dense weight, or one int32 for each element."""
    kind = _DATA_TYPES.get(tensor.data_type)
    item = np.dtype(kind.bits).itemsize if kind else 0
    elements: int = math.prod(tensor.dims)
    return elements * max(4, item)


def _candidates(
    tensor: TensorProto, prefix: str, opset: int, grid: NDArray[Any], kept: NDArray[np.int64], fill: int
) -> Iterator[_Candidate]:
    for codec in CODECS:
        if codec.usable(opset, len(grid)):
            emitter = _encode(codec, tensor, prefix, opset, grid, kept, fill)
            if emitter is not None:
                storage = codec.name if grid.shape[1] == 1 else f"kernel-{codec.name}"
                size = sum(map(_wire, emitter.initializers)) + sum(map(_wire, emitter.nodes))
                yield _Candidate(storage, emitter, size)


def _encode(
    codec: Codec, tensor: TensorProto, prefix: str, opset: int, grid: NDArray[Any], kept: NDArray[np.int64], fill: int
) -> Emitter | None:
    """The decode graph of `tensor`, whose elements are `grid` [blocks, unit]; None where the codec cannot hold it."""
    blocks, unit = grid.shape
    block_bytes = unit * grid.itemsize
    # empty tensors confuse runtimes: an all-zero weight keeps one zero
    encoded = codec.encode(kept if len(kept) else np.zeros(1, np.int64), blocks, block_bytes)
    if encoded is None:
        return None
    emitter = Emitter(prefix, opset, tensor.data_type, fill.to_bytes(grid.itemsize, "little"))
    raw = grid[encoded.positions].tobytes()
    values = emitter.tensor("values", raw, (len(encoded.positions), unit))
    dense = codec.build(emitter, encoded, values, blocks, unit)
    emitter.reshape(dense, "shape", tuple(tensor.dims), output=tensor.name)
    mark = {"format": _FORMAT, "codec": codec.name, "unit": unit}
    if encoded.base:
        mark["base"] = encoded.base
    if fill:
        mark["fill"] = fill
    emitter.nodes[-1].name = emitter.name(_MARK)
    emitter.nodes[-1].doc_string = json.dumps(mark, separators=(",", ":"))
    emitter.initializers[0].doc_string = tensor.doc_string
    return emitter


def _kept_blocks(grid: NDArray[Any], has_sign_bit: bool) -> NDArray[np.int64]:
    """Rising positions of the rows [unit] that hold anything but 0, +0.0 and -0.0; elements are unsigned bit patterns."""
    sign = grid.dtype.type(1 << (8 * grid.itemsize - 1) if has_sign_bit else 0)
    kept = (grid & ~sign) != 0
    return np.flatnonzero(kept if grid.shape[1] == 1 else kept.any(axis=1)).astype(np.int64, copy=False)


def _bits(tensor: TensorProto) -> NDArray[Any]:
    """The elements as flat unsigned bit patterns."""
    kind = _DATA_TYPES[tensor.data_type]
    if is_aside(tensor):
        bits = array_of(tensor).reshape(-1).view(kind.bits)
    elif tensor.HasField("raw_data"):
        bits = np.frombuffer(tensor.raw_data, kind.bits)
    else:
        bits = np.array(getattr(tensor, kind.field), kind.typed).view(kind.bits)
    if bits.size != math.prod(tensor.dims):
        raise ModelError(f"Weight '{tensor.name}' holds {bits.size} elements but its shape is {list(tensor.dims)}; export it again.")
    return bits


def _wire(message: TensorProto | onnx.NodeProto) -> int:
    """Serialized bytes of one entry of a graph: tag, length and the message."""
    size = wire_size(message)
    return 1 + max(1, -(-size.bit_length() // 7)) + size


# ---- writing


def _mark(emitter: Emitter, model: onnx.ModelProto, name: str, ir_version: int) -> None:
    """Note what else changes in the model, so that unpack can restore it."""
    notes: dict[str, Any] = {"ir": ir_version} if ir_version < 4 else {}
    for position, value in enumerate(_all_inputs(model)):
        if value.name == name and any(listed.name == name for listed in model.graph.input):
            notes["input"] = _entry(position, value)
    _note(emitter, notes)


def _entry(position: int, value: onnx.ValueInfoProto) -> list[Any]:
    return [position, base64.b64encode(value.SerializeToString(deterministic=True)).decode()]


def _note(emitter: Emitter, notes: Mapping[str, Any]) -> None:
    if notes:
        last = emitter.nodes[-1]
        last.doc_string = json.dumps({**json.loads(last.doc_string), **notes}, separators=(",", ":"))


def _apply(source: onnx.ModelProto, chosen: Mapping[str, Emitter]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(source)
    if not chosen:
        return result
    dropped = set(chosen)
    if source.ir_version < 4:
        # Before 4 each initializer had to be an input. From 4 on such an input can be overridden, which would keep onnxruntime
        # from fusing what reads it: all initializers stop being inputs, and the first packed weight remembers them.
        result.ir_version = 4
        dropped |= {t.name for t in source.graph.initializer}
        others = [_entry(i, v) for i, v in enumerate(_all_inputs(source)) if v.name in dropped and v.name not in chosen]
        _note(next(iter(chosen.values())), {"inputs": others} if others else {})
    graph = result.graph
    pieces = [p for t in source.graph.initializer for p in (chosen[t.name].initializers if t.name in chosen else [t])]
    _replace(graph.initializer, pieces)
    _replace(graph.node, [*(n for e in chosen.values() for n in e.nodes), *source.graph.node])
    _replace(graph.input, [v for v in source.graph.input if v.name not in dropped])
    stored = {t.name: t for t in source.graph.initializer if t.name in chosen}
    for info in graph.value_info:  # what is said of stored tensors counts only now, and converters leave old types there
        if info.name in stored:
            info.type.tensor_type.elem_type = stored[info.name].data_type
    return result


def _replace(field: Any, items: Sequence[Any]) -> None:
    del field[:]
    field.extend(items)


def _opset(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _all_names(graph: onnx.GraphProto) -> set[str]:
    """Every tensor and node name in the graph and its subgraphs."""
    names = {v.name for field in (graph.input, graph.output, graph.value_info, graph.initializer) for v in field}
    names.update(t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        names.update([node.name, *node.input, *node.output])
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                    names.update(_all_names(subgraph))
    return names


def _free_prefix(number: int, names: Iterable[str]) -> str:
    """A short name for what rebuilds a weight: it is written some twenty times, so the weight's own would cost more than many weights."""
    prefix = f"p{number}"
    while any(other.startswith(prefix + "/") for other in names):
        prefix += "_"
    return prefix


# ---- reading back


def _marks(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, dict[str, Any]]]:
    """Last decode nodes with their notes."""
    for node in graph.node:
        if node.name.endswith(f"/{_MARK}") and _FORMAT in node.doc_string:
            try:
                notes = json.loads(node.doc_string)
            except ValueError as cause:
                raise ModelError(
                    f"The packing notes of node '{node.name}' are not valid JSON; restore the file from its origin."
                ) from cause
            yield node, notes


def _unpacked(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """A copy of the model in which the packed weights among `names` are dense."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    marks = [(node, notes) for node, notes in _marks(model.graph) if node.output[0] in names]
    if not marks:
        return result
    index = {t.name: t for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    dense: dict[str, TensorProto] = {}  # by the name of the first piece, whose place it takes
    gone: set[str] = set()
    for node, notes in marks:
        prefix = node.name.removesuffix(_MARK)
        gone |= _inner_names(node, prefix, makers)
        dense[f"{prefix}values"] = _decode(node, notes, index, prefix)
    graph = result.graph
    tensors = [dense.get(t.name, t) for t in model.graph.initializer if t.name in dense or t.name not in gone]
    _replace(graph.initializer, tensors)
    _replace(graph.node, [n for n in model.graph.node if not gone.intersection(n.output)])
    packed = set(packed_names(result))
    _replace(graph.input, [v for v in _all_inputs(model) if v.name not in packed])
    if not packed:
        result.ir_version = _first_ir_version(model)
    return result


def _inner_names(last: onnx.NodeProto, prefix: str, makers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Every tensor that only serves to rebuild one weight, and the weight itself."""
    found = set(last.output)
    todo = list(last.input)
    while todo:
        name = todo.pop()
        if name.startswith(prefix) and name not in found:
            found.add(name)
            todo.extend(makers[name].input if name in makers else ())
    return found


def _decode(node: onnx.NodeProto, notes: Mapping[str, Any], index: Mapping[str, TensorProto], prefix: str) -> TensorProto:
    try:
        codec = next(c for c in CODECS if c.name == notes["codec"])
        values = index[f"{prefix}values"]
        dims = tuple(int(d) for d in array_of(index[f"{prefix}shape"]))
        labels = ("bits", "words", "powers", "gaps")
        pieces = {k: array_of(index[prefix + k]) for k in labels if prefix + k in index}
        kind = _DATA_TYPES[values.data_type]
        blocks = math.prod(dims) // int(notes["unit"])
        flat = np.full((blocks, int(notes["unit"])), int(notes.get("fill", 0)), kind.bits)
        flat[codec.decode(pieces, int(notes.get("base", 0)))] = _bits(values).reshape(-1, flat.shape[1])
    except (StopIteration, KeyError, IndexError, ValueError, TypeError) as cause:
        raise ModelError(
            f"Packed weight '{node.output[0]}' cannot be rebuilt, its stored pieces are missing or damaged; "
            "restore the file from its origin."
        ) from cause
    dense = TensorProto(
        name=node.output[0],
        data_type=values.data_type,
        dims=dims,
        raw_data=flat.tobytes(),
        doc_string=values.doc_string or None,
    )
    return like(dense, *(index[prefix + label] for label in ("values", *labels) if prefix + label in index))


def _all_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph's inputs and, at their first places, the initializers that were inputs before packing."""
    inputs = list(model.graph.input)
    listed = [notes["input"] for _, notes in _marks(model.graph) if "input" in notes]
    listed += [entry for _, notes in _marks(model.graph) for entry in notes.get("inputs", [])]
    for position, text in sorted(listed, key=lambda entry: int(entry[0])):
        inputs.insert(int(position), onnx.ValueInfoProto.FromString(base64.b64decode(text)))
    return inputs


def _first_ir_version(model: onnx.ModelProto) -> int:
    """The IR version before anything was packed."""
    return min([model.ir_version, *(int(notes.get("ir", model.ir_version)) for _, notes in _marks(model.graph))])
