"""Copies of a model in other floating point types: `python sample_models/half.py MODEL OUT [--type float16] [--keep-io] [--block OP ...]`.

All float32 weights, Constant nodes, casts and fills become the other type. `--keep-io`: inputs and outputs stay float32, with a Cast behind
and before them. `--block`: nodes of those operators go on in float32, between Casts, and keep their weights so. `--stored`: only weights
with two axes or more are stored in the other type, each with a Cast back to float32 behind it, and the model computes as before: how
models in bfloat16 usually come.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "double": TensorProto.DOUBLE}
# Inputs that must be float32 whatever the others are.
FIXED = {"Resize": (1, 2), "Upsample": (1,)}


def converted(tensor: TensorProto, element: int) -> TensorProto:
    """The same numbers in another type."""
    values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(element))
    return numpy_helper.from_array(np.ascontiguousarray(values).reshape(tensor.dims), tensor.name)


def convert(model: onnx.ModelProto, to: str = "float16", keep_io: bool = False, block: Collection[str] = ()) -> onnx.ModelProto:
    """A copy whose float32 tensors are of the type `to`. Bodies of control flow are not looked into."""
    element = TYPES[to]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    stored = {item.name: item for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    fixed = {name for node in graph.node for slot, name in enumerate(node.input) if _stays(node, slot, block)}
    for name, item in stored.items():
        if name not in fixed:
            item.CopyFrom(converted(item, element))
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    floats = {info.name for info in graph.input if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    for info in graph.input:
        if info.name not in floats or (info.name in stored and info.name in fixed):
            continue
        if keep_io and info.name not in stored:
            renamed[info.name] = f"{info.name}/{to}"
            nodes.append(_cast(info.name, renamed[info.name], element))
        else:
            info.type.tensor_type.elem_type = element
    types = _types(model)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        blocked = node.op_type in block
        for slot, name in enumerate(node.input):
            base = next((old for old, new in renamed.items() if new == name), name)
            if blocked and types.get(base) == TensorProto.FLOAT and name not in stored:
                nodes.append(_cast(name, f"{name}/for/{node.output[0]}", TensorProto.FLOAT))
                node.input[slot] = nodes[-1].output[0]
        for item in node.attribute:
            if not blocked and item.type == onnx.AttributeProto.TENSOR and item.t.data_type == TensorProto.FLOAT:
                item.t.CopyFrom(converted(item.t, element))
            if not blocked and node.op_type == "Cast" and item.name == "to" and item.i == TensorProto.FLOAT:
                item.i = element
        outputs = [name for name in node.output if blocked and types.get(name) == TensorProto.FLOAT]
        for name in outputs:
            node.output[list(node.output).index(name)] = f"{name}/float"
        nodes.append(node)
        nodes += [_cast(f"{name}/float", name, element) for name in outputs]
    for info in graph.output:
        if info.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        if keep_io:
            for node in nodes:
                node.output[:] = [f"{name}/{to}" if name == info.name else name for name in node.output]
                node.input[:] = [f"{name}/{to}" if name == info.name else name for name in node.input]
            nodes.append(_cast(f"{info.name}/{to}", info.name, TensorProto.FLOAT))
        else:
            info.type.tensor_type.elem_type = element
    return _finished(result, nodes)


def store(model: onnx.ModelProto, to: str = "bfloat16") -> onnx.ModelProto:
    """A copy that stores weights of two axes or more in the type `to`, with a Cast back to float32 behind each."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    casts = []
    for item in result.graph.initializer:
        if item.data_type == TensorProto.FLOAT and len(item.dims) >= 2:
            item.CopyFrom(converted(item, TYPES[to]))
            casts.append(_cast(item.name, f"{item.name}/float", TensorProto.FLOAT))
    names = {node.input[0]: node.output[0] for node in casts}
    for node in result.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return _finished(result, [*casts, *result.graph.node])


def _stays(node: onnx.NodeProto, slot: int, block: Collection[str]) -> bool:
    return node.op_type in block or slot in FIXED.get(node.op_type, ())


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    return {info.name: info.type.tensor_type.elem_type for info in infos}


def _cast(source: str, target: str, element: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{source}/to/{target}", to=element)


def _finished(model: onnx.ModelProto, nodes: list[Any]) -> onnx.ModelProto:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return onnx.shape_inference.infer_shapes(model)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(TYPES), default="float16")
    parser.add_argument("--keep-io", action="store_true")
    parser.add_argument("--block", nargs="*", default=[])
    parser.add_argument("--stored", action="store_true")
    given = parser.parse_args()
    model = onnx.load(given.model)
    onnx.save(store(model, given.type) if given.stored else convert(model, given.type, given.keep_io, given.block), given.out)


if __name__ == "__main__":
    main()
