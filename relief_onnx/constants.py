"""Which channels are constant whatever the input: forward through the graph, from zeros in weights and with the operator table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from relief_onnx.contractions import LABELS
from relief_onnx.coupling import Coupling
from relief_onnx.graph import Graph
from relief_onnx.grids import carried
from relief_onnx.layers import LAYER_OPERATORS, Layer, Plan
from relief_onnx.microsoft import EVALUATED, MICROSOFT
from relief_onnx.moves import Together
from relief_onnx.ops import OperatorRow, row_of
from relief_onnx.recurrent_reads import cell_of
from relief_onnx.recurrent_units import always_zero, as_picture, stored_zeros
from relief_onnx.sources import Source, trace_constant
from relief_onnx.views import View

__all__ = ["Constants", "Routes", "along", "broadcasts", "exact"]

Values = NDArray[np.float64]
_WHOLE: Mapping[int, Any] = {
    onnx.TensorProto.INT32: np.int32, onnx.TensorProto.INT64: np.int64, onnx.TensorProto.BOOL: np.bool_,
    onnx.TensorProto.INT8: np.int8, onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.INT16: np.int16, onnx.TensorProto.UINT16: np.uint16,
}  # fmt: skip
Flags = NDArray[np.bool_]


class Routes:
    """Where the entries of a carrying node's outputs come from; remembered, because both walks ask again and again."""

    def __init__(self, graph: Graph, coupling: Coupling) -> None:
        self._graph, self._coupling = graph, coupling
        self._moves: dict[int, list[NDArray[np.int64]]] = {}

    def data(self, node: onnx.NodeProto, row: OperatorRow) -> list[str]:
        return [name for i, name in enumerate(node.input) if name and (row.data is None or i in row.data)]

    def moved(self, index: int, node: onnx.NodeProto, row: OperatorRow) -> list[NDArray[np.int64]]:
        """For each output of a carrying node: where in its inputs' pictures (joined flat) each entry comes from [alternatives, *shape].

        UNTRACKED where that is not known, NEW from nowhere.
        """
        if index not in self._moves:
            assert row.carry is not None
            pictures, start = [], 0
            for name in self.data(node, row):
                shape = self._coupling.pictures[name].shape
                size = int(np.prod(shape))
                pictures.append(np.arange(start, start + size).reshape(shape))
                start += size
            self._moves[index] = [
                item.alternatives if isinstance(item, Together) else item[None] for item in row.carry(self._graph, node, pictures)
            ]
        return self._moves[index]


class Constants:
    """The constants of a model: `values` holds for each tensor a picture of numbers, NaN where a channel is not constant.

    `weights` are canonical arrays by layer node; they may be changed before `compute` is called again.
    """

    def __init__(self, graph: Graph, plan: Plan, coupling: Coupling, routes: Routes) -> None:
        self.graph, self.coupling, self._routes = graph, coupling, routes
        self.layers, self.recurrent = plan.single(), plan.recurrent()
        self.weights = {layer.key: layer.view.apply(graph.array(layer.weight)) for layer in plan.layers}
        self.values: dict[str, Values] = {}
        self._biases = {layer.key: self._own_bias(layer) for layer in plan.layers}
        self._counting = {reader.node for reader in coupling.zero_readers}

    def _unknown(self, name: str) -> Values:
        return np.full(self.coupling.pictures[name].shape, np.nan)

    def compute(self) -> None:
        """Find every constant again."""
        self.values = {name: self._emitted(name, view) for name, view in self.coupling.sources.items()}
        given = [info.name for info in self.graph.inputs if self.coupling.pictures[info.name].size > 1]
        self.values |= {name: self._unknown(name) for name in given}
        for index, node in enumerate(self.graph.nodes):
            if index in self.coupling.constants:
                continue
            for name in node.output:
                if name in self.coupling.pictures:
                    self.values[name] = self._unknown(name)
            row = row_of(node)
            if index in self.coupling.barriers:
                continue
            if index in self.layers:
                self._layer_constants(self.layers[index])
            elif index in self.recurrent:
                self._recurrent_constants(index, node, self.recurrent[index])
            elif row is not None and self._running(node):
                self._row_constants(index, node, row)

    def _running(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name in self.values]

    def of_inputs(self, layer: Layer) -> Values:
        """Per input channel [C] of a layer."""
        channels = layer.groups * layer.in_per_group
        found = self.values.get(layer.input)
        if found is None or not along(found, layer.input_axis, channels):
            return np.full(channels, np.nan)
        return np.broadcast_to(found.reshape(-1), channels)

    def _layer_constants(self, layer: Layer) -> None:
        name = self.graph.nodes[layer.node].output[0]
        inputs, weight = self.of_inputs(layer), self.weights[layer.key]
        bias = self._biases[layer.key]
        picture = self.values[name]
        if picture.size != layer.out_channels or bias is None:
            return
        reading = weight.reshape(*weight.shape[:2], -1).any(-1)
        usable = np.where(np.isnan(inputs) | ((inputs != 0) & (not exact(layer))), np.nan, inputs)
        per_unit = np.repeat(usable.reshape(layer.groups, -1), layer.out_channels // layer.groups, 0)
        sums = weight.reshape(*weight.shape[:2], -1).sum(-1, dtype=np.float64)
        total = np.where(reading, sums * per_unit, 0.0).sum(1) * layer.scale + bias
        self.values[name] = total.reshape(picture.shape)

    def _recurrent_constants(self, index: int, node: onnx.NodeProto, layers: Mapping[str, Layer]) -> None:
        """Units that are 0 at every step; `values` has them for what R reads too."""
        kind, batch_first = layers["R"].recurrent, cell_of(node).batch_first
        assert kind is not None
        sizes = (kind.directions, kind.hidden)

        def starts(name: str) -> Flags | None:
            found = self.values.get(name)
            if found is None or found.ndim != 3 or found.shape[2] != kind.hidden:
                return stored_zeros(self.graph, name, kind, batch_first)
            return np.broadcast_to((found == 0).all(0 if batch_first else 1), sizes)

        zero = np.where(always_zero(self.graph, index, layers, self.weights, starts), 0.0, np.nan)
        for name in node.output:
            if name:
                shape = self.values[name].shape
                self.values[name] = _fit_values(as_picture(zero, len(shape), batch_first), shape)
        self.values[layers["R"].input] = np.repeat(zero, layers["R"].groups // kind.directions, 0).reshape(-1)

    def _emitted(self, name: str, view: View) -> Values:
        """What a stored table emits per channel: a number where the whole column is that number."""
        source = trace_constant(self.graph, name)
        assert isinstance(source, Source)
        array = view.apply(self.graph.array(source.name))
        return _fit_values(array.astype(np.float64), self.coupling.pictures[name].shape)

    def _row_constants(self, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
        if row.kind == "contract":
            self._contracted_constants(node)
        elif index in self._counting and row.kind == "sum":
            return
        elif row.constant == "scaled":
            self._scaled_constants(node)
        elif row.kind in ("carry", "sum", "grow") and row.carry is not None:
            self._carry_constants(index, node, row)
        elif row.kind == "range" or (row.kind == "quantise" and any(name and self._constant(name) is None for name in node.input[1:])):
            # The zero point is measured when the model runs: 0 stands for it meanwhile.
            found = self.values[node.input[0]]
            self.values[node.output[0]] = np.where(found == 0, 0.0, np.nan)
        elif row.constant == "computed":
            self._computed_constants(node, row)

    def _scaled_constants(self, node: onnx.NodeProto) -> None:
        """A scale of 0 leaves the shift, whatever the statistics are."""
        name = node.output[0]
        shape = self.values[name].shape
        axis = next((axis for axis, size in enumerate(shape) if size > 1), None)
        values = [self._constant(item) if item else None for item in (*node.input[1:3], "")[:2]]
        if axis is None or values[0] is None or (values[1] is None and len(node.input) > 2 and node.input[2]):
            return
        scale, shift = (np.zeros(1) if value is None else value.reshape(-1).astype(np.float64) for value in values)
        if shape[axis] % scale.size or shape[axis] % shift.size:
            return
        scale, shift = (np.repeat(value, shape[axis] // value.size) for value in (scale, shift))
        line = np.where(scale == 0, shift, np.nan)
        self.values[name] = line.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def _contracted_constants(self, node: onnx.NodeProto) -> None:
        """A channel that lasts is 0 where one factor is."""
        name = node.output[0]
        labels, out = LABELS[node.op_type](self.graph, node)
        shape = self.values[name].shape
        zero: Any = np.zeros(shape, bool)
        for item, own in zip(node.input, labels, strict=True):
            found = self.values.get(item)
            axis = next((axis for axis, size in enumerate(found.shape) if size > 1), None) if found is not None else None
            if found is not None and axis is not None and own[axis] in out and shape[out.index(own[axis])] == found.shape[axis]:
                zero = zero | (found == 0).reshape([-1 if label == own[axis] else 1 for label in out])
        self.values[name] = np.where(zero, 0.0, np.nan)

    def _carry_constants(self, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
        survives = row.survives(self.graph, node)
        if survives == "lost":
            return
        names = self._routes.data(node, row)
        if all(self.coupling.pictures[name].size == 1 for name in names):
            return
        flat = np.concatenate([self.values.get(name, np.full(self.coupling.pictures[name].shape, np.nan)).reshape(-1) for name in names])
        if survives == "zero":
            flat = np.where(flat == 0, 0.0, np.nan)
        padded = np.append(flat, [0.0, np.nan])  # at NEW and at UNTRACKED
        for name, move in zip(node.output, self._routes.moved(index, node, row), strict=False):
            if name:
                together = _agreeing(padded[move])
                self.values[name] = _fit_values(together, self.values[name].shape)

    def _computed_constants(self, node: onnx.NodeProto, row: OperatorRow) -> None:
        """Run the operator itself on the constants, one number per channel."""
        name = node.output[0]
        if not self.graph.is_float(name) and row.kind != "quantise":
            return  # sizes, not channels
        shape = self.values[name].shape
        running = set(self._running(node))
        feeds: dict[str, NDArray[Any]] = {}
        unknown: Any = np.zeros(shape, bool)
        absorbed: Any = np.zeros(shape, bool)
        for item in node.input:
            if item in running:
                values = self.values[item]
                feeds[item] = np.nan_to_num(values).astype(_WHOLE.get(self.graph.types.get(item, (0,))[0], np.float32))
                aligned = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
                unknown = unknown | np.isnan(aligned)
                absorbed = absorbed | ((aligned == 0) & row.absorbs_zero)
            elif item:
                value = self._constant(item)
                if value is None:
                    return
                if row.kind == "mix" and value.dtype.kind == "f" and value.ndim <= len(shape):
                    # What varies along an axis that is not tracked (a table of positions) is a number only where it does not.
                    value = _fit_lifted(value, shape)
                    unknown = unknown | np.isnan(value)
                if row.absorbs_zero and broadcasts((1,) * (len(shape) - value.ndim) + value.shape, shape):
                    absorbed = absorbed | (value == 0)
                value = np.where(np.isnan(value), 0, value) if value.dtype.kind == "f" else value
                feeds[item] = value.astype(np.float32) if value.dtype.kind == "f" or value.dtype.itemsize == 2 else value
        if bool(np.all(unknown & ~absorbed)):
            return
        result = _evaluate(self.graph, node, feeds, row)
        if result is None or result.shape != shape:
            return
        self.values[name] = np.where(unknown, np.where(absorbed, 0.0, np.nan), result)

    def _constant(self, tensor: str) -> NDArray[Any] | None:
        source = trace_constant(self.graph, tensor)
        if isinstance(source, Source):
            return source.view.apply(self.graph.array(source.name))
        return self.graph.constant(tensor)

    def _own_bias(self, layer: Layer) -> Values | None:
        """The bias in the node itself [out]; None where it varies along other axes."""
        if layer.recurrent is not None:
            return None  # the gates make no constants of it
        node, slot = self.graph.nodes[layer.node], LAYER_OPERATORS[layer.op].bias_slot
        if slot is None or len(node.input) <= slot or not node.input[slot]:
            return np.zeros(layer.out_channels)
        if layer.bias is None or layer.bias.node != layer.node:
            return None
        value = layer.bias.view.apply(self.graph.array(layer.bias.name)).astype(np.float64)
        return value * layer.bias.factor

    def zeros(self, name: str, axis: int) -> Flags:
        """Which channels along a tracked axis are always 0."""
        found = self.values.get(name)
        size = self.coupling.pictures[name].shape[axis]
        if found is None:
            return np.zeros(size, bool)
        zeros: Flags = (np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1) == 0).all(1)
        return np.broadcast_to(zeros, size)


def exact(layer: Layer) -> bool:
    """Whether a constant input gives the same value everywhere: not across zero padding, nor in a transposed convolution."""
    geometry = layer.geometry
    return geometry is None or (not geometry.transposed and geometry.auto_pad in ("NOTSET", "VALID") and not any(geometry.pads))


def along(picture: NDArray[Any], axis: int, channels: int) -> bool:
    """Whether a picture tracks nothing but that axis, with so many channels, or nothing at all."""
    return picture.size == 1 or (picture.size == channels and picture.shape[axis] == channels)


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(size in (1, wanted) for size, wanted in zip(shape, target, strict=True))


def _agreeing(values: Values) -> Values:
    """Of alternatives [k, *shape] what all agree on, else NaN."""
    agreed: Values = np.where((values == values[:1]).all(0), values[0], np.nan)
    return agreed


def _fit_values(values: Values, shape: tuple[int, ...]) -> Values:
    """Reduce to a picture's shape: an axis that the picture does not track keeps a value only where all agree."""
    if values.ndim != len(shape):
        return np.full(shape, np.nan)
    for axis, size in enumerate(shape):
        if size == 1 and values.shape[axis] > 1:
            first = values.take([0], axis)
            values = np.where((values == first).all(axis, keepdims=True), first, np.nan)
    return np.broadcast_to(values, shape).copy() if broadcasts(values.shape, shape) else np.full(shape, np.nan)


def _fit_lifted(value: NDArray[Any], shape: tuple[int, ...]) -> Values:
    """A stored constant, lifted to a picture's rank and reduced to the axes that it tracks."""
    lifted = value.reshape((1,) * (len(shape) - value.ndim) + value.shape).astype(np.float64)
    return _fit_values(lifted, tuple(1 if size == 1 else wanted for size, wanted in zip(lifted.shape, shape, strict=True)))


def _evaluate(graph: Graph, node: onnx.NodeProto, feeds: dict[str, NDArray[Any]], row: OperatorRow) -> Values | None:
    if row.kind == "quantise":
        x, scale, *zero = (feeds[name] for name in node.input if name)
        made = carried(node, x, scale, zero[0] if zero else None)
        return None if made is None else made.astype(np.float64)
    copy = onnx.NodeProto.FromString(node.SerializeToString())
    opset = graph.opset
    if row.kind == "affine":
        # The reference evaluator mixes statistics of the batch into BatchNormalization of opset 9 to 13; inference is the same from 14 on.
        opset = max(opset, 15)
        kept = [item for item in copy.attribute if item.name != "spatial"]
        del copy.attribute[:]
        copy.attribute.extend(kept)
        feeds = {**feeds, node.input[0]: np.broadcast_to(feeds[node.input[0]], _affine_shape(feeds, node))}
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(feeds[name].dtype) for name in node.input if name}
    inputs = [onnx.helper.make_tensor_value_info(name, element, None) for name, element in types.items()]
    body = onnx.helper.make_graph([copy], "one", inputs, [onnx.ValueInfoProto(name=node.output[0])])
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)])
    with np.errstate(all="ignore"):
        values: Any = ReferenceEvaluator(model, new_ops=EVALUATED).run([node.output[0]], feeds)
        result = np.asarray(values[0], np.float64)
    return np.where(np.isfinite(result), result, np.nan)  # of what is not known 0 was tried, which may have no logarithm


def _affine_shape(feeds: dict[str, NDArray[Any]], node: onnx.NodeProto) -> tuple[int, ...]:
    shape = list(feeds[node.input[0]].shape)
    shape[1] = feeds[node.input[1]].size
    return tuple(shape)
