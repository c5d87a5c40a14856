"""Float weights that the file itself rounds (QuantizeLinear before DequantizeLinear), as quantisation-aware training exports them.

They are stored as the integers that they become: a pass of `lowering`, before `quantised`, which knows integers. The way back gives a
weight that nobody changed its floats and its QuantizeLinear again; others stay integers, as quantisers write them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.aside import array_of, tensor_of
from relief_onnx.bodies import replace_all
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.grids import RANGES, carried
from relief_onnx.nodes import STANDARD, captured, subgraphs
from relief_onnx.quantised_rows import MICROSOFT

if TYPE_CHECKING:
    from relief_onnx.datatypes import Kept

__all__ = ["store_rounded"]

_DOMAINS = (*STANDARD, MICROSOFT)


@dataclass(frozen=True)
class _Rounded:
    """A weight that node number `node` rounds to `integers`, its `output`. made: the name that these have while we work.

    after: scale and zero point, which readers take too.
    """

    node: int
    weight: str
    output: str
    made: str
    integers: NDArray[Any] = field(repr=False)
    after: tuple[NDArray[Any], ...] = field(repr=False)


def store_rounded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Callable[[onnx.ModelProto, Kept], onnx.ModelProto]] | None:
    """A pass (see `lowering`)."""
    if model.ir_version < 4 or not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return None
    graph = Graph(model)
    found = [item for index in range(len(graph.nodes)) if (item := _rounded(graph, index)) is not None]
    if not found:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    renamed = {item.output: item.made for item in found}
    for index in sorted((item.node for item in found), reverse=True):
        del result.graph.node[index]
    for node in result.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    _write(result, {item.made: tensor_of(item.integers, item.made, graph.initializers[item.weight]) for item in found}, model)
    return result, lambda edited, kept: _floats_again(edited, graph, found)


def _rounded(graph: Graph, index: int) -> _Rounded | None:
    """A stored weight that the QuantizeLinear node number `index` rounds, for readers that make floats of the integers."""
    node = graph.nodes[index]
    if node.op_type != "QuantizeLinear" or node.domain not in _DOMAINS or graph.is_output(node.output[0]):
        return None
    weight = graph.initializers.get(node.input[0])
    if (
        weight is None
        or weight.data_type not in FLOATS
        or len(weight.dims) < 1
        or node.input[0] in {item.name for item in graph.model.graph.input}
    ):
        return None
    after = tuple(value for name in node.input[1:] if name and (value := graph.constant(name)) is not None)
    if len(after) < len([name for name in node.input[1:] if name]):
        return None
    if not graph.uses.get(node.output[0]) or any(reader.op_type != "DequantizeLinear" for reader in _readers(graph, node.output[0])):
        return None
    integers = carried(node, graph.array(node.input[0]), after[0], after[1] if len(after) > 1 else None)
    kind = np.uint8 if len(after) < 2 else after[1].dtype
    if integers is None or helper.np_dtype_to_tensor_dtype(np.dtype(kind)) not in RANGES:
        return None
    alone = len(graph.uses[node.input[0]]) == 1 and not graph.is_output(node.input[0])
    made = node.input[0] if alone else node.output[0]
    return _Rounded(index, node.input[0], node.output[0], made, integers.astype(kind), after)


def _readers(graph: Graph, name: str) -> list[onnx.NodeProto]:
    """Who reads integers, also behind a Clip, which says that fewer bits are used."""
    found = []
    for use in graph.uses.get(name, []):
        node = graph.nodes[use.node]
        clips = node.op_type == "Clip" and use.slot == 0 and not graph.is_output(node.output[0])
        found += _readers(graph, node.output[0]) if clips else [node]
    return found


def _floats_again(model: onnx.ModelProto, before: Graph, found: Sequence[_Rounded]) -> onnx.ModelProto:
    """The floats and nodes of what nobody changed."""
    graph = Graph(model)
    back = {item.made: item for item in found if _is_same(graph, item)}
    if not back:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in result.graph.node:
        for slot, name in enumerate(node.input):
            if name in back:
                nodes += [before.nodes[back[name].node]] if name not in done else []
                done.add(name)
                node.input[slot] = back[name].output
        nodes.append(node)
    replace_all(result.graph.node, nodes)
    needed = {name for item in back.values() for name in before.nodes[item.node].input}
    _write(result, {name: before.initializers[name] for name in needed if name in before.initializers}, before.model)
    return result


def _is_same(graph: Graph, item: _Rounded) -> bool:
    """Whether the integers and what they stand for are those of the file, and only DequantizeLinear nodes read them."""
    stored = graph.initializers.get(item.made)
    if stored is None or not np.array_equal(array_of(stored), item.integers):
        return False
    for node in _readers(graph, item.made):
        values = [graph.constant(name) for name in node.input[1:] if name]
        if node.op_type != "DequantizeLinear" or len(values) != len(item.after):
            return False
        if not all(value is not None and np.array_equal(value, old) for value, old in zip(values, item.after, strict=True)):
            return False
    return True


def _write(model: onnx.ModelProto, new: dict[str, TensorProto], like: onnx.ModelProto) -> None:
    """Store tensors, in the order of `like`; floats and integers that nobody reads any more go, and so does what was said of them."""
    read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    read |= {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}
    places = {item.name: number for number, item in enumerate(like.graph.initializer)}
    held = {item.name: item for item in model.graph.initializer} | new
    items = sorted(
        (item for name, item in held.items() if name in read or name not in new), key=lambda item: places.get(item.name, len(places))
    )
    copies = [TensorProto.FromString(item.SerializeToString()) for item in items]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
    made = {name for node in model.graph.node for name in node.output} - set(new)
    infos = [info for info in model.graph.value_info if info.name in made]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
