"""Layer normalisations that onnxruntime's optimisers fused with the sums and embeddings before them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.fused_place import MAIN, Edited, Found, Place, Rewrite
from relief_onnx.moves import Barrier

__all__ = ["embed_layer_normalization", "skip_layer_normalization", "skip_simplified_layer_normalization"]

_STORED = frozenset({"MatMul", "FusedMatMul"})


def _is_product(place: Place, slot: int) -> bool:
    """Whether a dense layer, read by nobody else, makes that input: then a bias is the layer's."""
    maker = place.graph.producer.get(place.input(slot))
    uses = place.graph.uses.get(place.input(slot), ())
    return maker is not None and len(uses) == 1 and place.graph.nodes[maker].op_type in _STORED


def _summed(place: Place, bias: int) -> str:
    """Both inputs and the bias; the sum is the last output."""
    first, second = (1, 0) if not _is_product(place, 0) and _is_product(place, 1) else (0, 1)
    x = place.input(first)
    if place.input(bias):
        x = place.op("bias", "Add", x, place.input(bias))
    if place.is_read(1) or place.is_read(2):
        raise Barrier("its statistics are read")
    # A norm whose channels are cut is padded with zeros (see `edits`), as it could not be in older operators.
    place.need(11, "its norm")
    total = place.op("sum", "Add", x, place.input(second), output=place.output(3) if place.is_read(3) else "")
    place.otherwise = (_padded, _spelled_out)
    return str(total)


def skip_layer_normalization(place: Place) -> None:
    """A residual sum, then LayerNormalization."""
    epsilon = float(place.values.get("epsilon", 1e-12))
    total = _summed(place, bias=4)
    scales = (place.input(2), place.input(3))
    place.op(MAIN, "LayerNormalization", total, *scales, output=place.output(0), axis=-1, epsilon=epsilon)


def skip_simplified_layer_normalization(place: Place) -> None:
    """A residual sum, then the norm without a mean."""
    epsilon = float(place.values.get("epsilon", 1e-12))
    total = _summed(place, bias=3)
    place.op(MAIN, "SimplifiedLayerNormalization", total, place.input(2), output=place.output(0), axis=-1, epsilon=epsilon, stash_type=1)


def embed_layer_normalization(place: Place) -> None:
    """Rows of two or three tables, their sum, LayerNormalization, and how many tokens count."""
    ids, segments, words, positions, kinds, gamma, beta, mask, places = (place.input(slot) for slot in range(9))
    place.need(11, "its norm")
    if not places:
        whole = {name: place.constant(name, np.asarray(value, np.int64)) for name, value in (("first", 0), ("step", 1))}
        length = place.op("tokens", "Gather", place.op("sizes", "Shape", ids), whole["step"], axis=0)
        places = place.op("places", "Range", whole["first"], length, whole["step"])
    total = place.op("words", "Gather", words, ids, axis=0)
    if kinds:
        total = place.op("with_kinds", "Add", total, place.op("kinds", "Gather", kinds, segments, axis=0))
    found = place.op("positions", "Gather", positions, places, axis=0)
    total = place.op("sum", "Add", total, found, output=place.output(2) if place.is_read(2) else "")
    if place.is_read(1):
        if not mask:
            raise Barrier("its count of tokens is read but it has no mask")
        if place.graph.opset < 13:
            place.op("counted", "ReduceSum", mask, output=place.output(1), axes=[1], keepdims=0)
        else:
            place.op("counted", "ReduceSum", mask, place.ints("counted/axes", 1), output=place.output(1), keepdims=0)
    epsilon = float(place.values.get("epsilon", 1e-12))
    place.op(MAIN, "LayerNormalization", total, gamma, beta, output=place.output(0), axis=-1, epsilon=epsilon)
    place.rebuild = _same_widths
    place.otherwise = (_spelled_out,)


def _same_widths(place: Place, found: Found) -> bool:
    """A table that lost columns makes the node emit fewer: it is put back as long as all tables have lost the same."""
    widths = {found.constants[name].dims[-1] for name in found.node.input[2:7] if name in found.constants}
    return len(widths) <= 1


def _padded(place: Place, model: Edited) -> Rewrite | None:
    """Sum, Pad, norm (see `edits`): both branches are padded and the fused node sums and normalises them."""
    norm, add = model.by_name.get(place.parts[MAIN].name), model.by_name.get(place.parts["sum"].name)
    pad = None if norm is None else model.producer.get(norm.input[0])
    if norm is None or add is None or pad is None or norm.op_type != place.parts[MAIN].op_type or len(model.readers[pad.output[0]]) > 1:
        return None
    if add.op_type != "Add" or pad.op_type != "Pad" or pad.input[0] != add.output[0] or len(set(add.input)) < 2:
        return None
    shapes = [model.graph.shape(name) for name in add.input]
    if any(shape is None or len(shape) != 3 for shape in shapes) or shapes[0] != shapes[1]:
        return None
    branches, gone, alone = list(add.input), [norm, pad], len(model.readers[add.output[0]]) == 1 and add.output[0] not in model.outputs
    node = onnx.NodeProto()
    node.CopyFrom(place.node)
    new: dict[str, Any] = {}
    node.input[:] = ["", "", *norm.input[1:]]
    if alone:
        gone.append(add)
        new = _wider_bias(place, model, node, branches, gone, pad)
    wide = [f"{norm.output[0]}/first", f"{norm.output[0]}/second"]
    pads = [helper.make_node("Pad", [name, *pad.input[1:]], [out], name=out) for name, out in zip(branches, wide, strict=True)]
    node.input[:2] = wide
    node.output[:] = norm.output[:1]
    return Rewrite(gone, [*pads, node], new)


def _wider_bias(
    place: Place, model: Edited, node: onnx.NodeProto, branches: list[str], gone: list[onnx.NodeProto], pad: onnx.NodeProto
) -> dict[str, Any]:
    """Give the fused node its bias again, with zeros at its end, where that is stored and alone; returns what to store."""
    part = place.parts.get("bias")
    add = None if part is None else model.by_name.get(part.name)
    if part is None or add is None or add.op_type != "Add" or add.output[0] not in branches or len(model.readers[add.output[0]]) > 1:
        return {}
    stored, amounts = model.constants.get(add.input[1]), model.constants.get(pad.input[1])
    if stored is None or amounts is None or len(stored.dims) != 1 or add.output[0] in model.outputs:
        return {}
    slot = list(place.node.input).index(part.input[1])
    node.input.extend([""] * (slot + 1 - len(node.input)))
    node.input[slot] = f"{add.input[1]}/wide"
    branches[branches.index(add.output[0])] = add.input[0]
    gone.append(add)
    return {node.input[slot]: np.pad(array_of(stored), (0, int(array_of(amounts)[-1])))}


def _spelled_out(place: Place, model: Edited) -> Rewrite | None:
    """A norm that must stand for itself, where the file's standard operators have none: the steps that it takes."""
    norm = model.by_name.get(place.parts[MAIN].name)
    simple = place.parts[MAIN].op_type == "SimplifiedLayerNormalization"
    if norm is None or norm.op_type != place.parts[MAIN].op_type or (place.graph.opset >= 17 and not simple):
        return None
    x, out = norm.input[0], norm.output[0]
    element = model.graph.types.get(x, (onnx.TensorProto.FLOAT, None))[0] or onnx.TensorProto.FLOAT
    epsilon = np.asarray(float(place.values.get("epsilon", 1e-12)), helper.tensor_dtype_to_np_dtype(element))
    new = {f"{out}/epsilon": epsilon} | ({f"{out}/axis": np.array([-1], np.int64)} if place.graph.opset >= 18 else {})
    axes: dict[str, Any] = {"axes": [-1]} if place.graph.opset < 18 else {}
    also = [] if axes else [f"{out}/axis"]
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, role: str, *inputs: str, **values: Any) -> str:
        name = f"{out}/{role}" if role else out
        nodes.append(helper.make_node(operator, list(inputs), [name], name=f"{norm.name}/{role}" if role else norm.name, **values))
        return name

    if not simple:
        x = add("Sub", "centred", x, add("ReduceMean", "mean", x, *also, keepdims=1, **axes))
    variance = add("ReduceMean", "variance", add("Mul", "squared", x, x), *also, keepdims=1, **axes)
    y = add("Div", "normed", x, add("Sqrt", "deviation", add("Add", "positive", variance, f"{out}/epsilon")))
    shift = norm.input[2] if len(norm.input) > 2 else ""
    y = add("Mul", "scaled" if shift else "", y, norm.input[1])
    if shift:
        add("Add", "", y, shift)
    return Rewrite([norm], nodes, new)
