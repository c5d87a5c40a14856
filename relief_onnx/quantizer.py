"""The door to onnxruntime.quantization: int8 weights and activations as QuantizeLinear and DequantizeLinear, calibrated on the samples."""

from __future__ import annotations

import contextlib
import heapq
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import onnx

from relief_onnx import aside
from relief_onnx import model as files
from relief_onnx.bodies import replace_all
from relief_onnx.dataset import Batch, Dataset
from relief_onnx.errors import DataError, ModelError
from relief_onnx.graph import Graph
from relief_onnx.nodes import STANDARD, captured, subgraphs
from relief_onnx.session import LOAD_ERRORS, Session, first_line

__all__ = ["METHODS", "quantize_activations", "version_refusal"]

METHODS = ("minmax", "entropy", "percentile")

# What onnxruntime's quantiser raises where it meets a graph that it does not know.
_ERRORS = (
    *LOAD_ERRORS, KeyError, TypeError, AttributeError, IndexError, AssertionError,
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError,
)  # fmt: skip
# Bytes of model inputs in one calibration batch, and samples in it at most.
_INPUT_BYTES = 4 << 20
_LARGEST_BATCH = 32
# Those that keep every activation of a batch in memory get smaller ones.
_LARGEST_HISTOGRAM_BATCH = 4


def version_refusal(opset: int) -> str:
    """Why a model of that opset cannot have int8 activations and keep its opset; empty where it can."""
    return "" if opset >= 10 else f"opset {opset} has no QuantizeLinear (opset 10 or newer has)"


class _Reader:
    """Our samples as onnxruntime's CalibrationDataReader; counts what it handed out."""

    def __init__(self, dataset: Dataset, size: int, limit: int | None, seed: int, progress: Any) -> None:
        self._batches: Callable[[], Iterator[Batch]] = lambda: dataset.batches(size, limit=limit, seed=seed)
        self._stream = self._batches()
        self._stop: int | None = None
        self._handed = 0
        self._done = 0.0
        self._total = dataset.samples if limit is None or dataset.samples is None else min(limit, dataset.samples)
        self._progress = progress

    def __len__(self) -> int:
        return sum(1 for _ in self._batches())

    def set_range(self, start_index: int, end_index: int) -> None:
        self._stop = end_index

    def get_next(self) -> dict[str, Any] | None:
        if self._stop is not None and self._handed >= self._stop:
            return None
        batch = next(self._stream, None)
        if batch is None:
            return None
        self._handed += 1
        self._done += batch.size * batch.weight
        self._progress("calibrate", round(self._done), self._total)
        return dict(batch.feed)


def quantize_activations(
    model: onnx.ModelProto,
    nodes: Collection[int],
    dataset: Dataset,
    *,
    activations: str,
    per_channel: bool,
    method: str,
    limit: int | None,
    seed: int,
    progress: Any = lambda stage, done, total: None,
) -> tuple[onnx.ModelProto, dict[str, tuple[str, str]]]:
    """A model whose `nodes` (numbers in the main graph) read and write int8 or uint8; weights symmetric int8, so that 0 stays 0.

    Also, by weight, the initializers that now hold its values and scale. Names, metadata, opset, inputs and outputs are those of `model`.
    Raises ModelError with onnxruntime's words where it refuses.
    """
    from onnxruntime import quantization as ort

    histogram = method != "minmax"
    named = onnx.ModelProto()
    named.CopyFrom(model)
    own = _name_nodes(named)
    wanted = [named.graph.node[i] for i in sorted(nodes)]
    # Shapes that an exporter wrote down wrongly make the probe fail; the quantiser infers its own, if told what ONNX knows nothing about.
    replace_all(named.graph.value_info, _foreign(Graph(model)))
    # An input that is an output too would be written a second time, by the pair of nodes that quantises it; as an output it stays as it is.
    given = {item.name for item in Graph(model).inputs}
    made = [item for item in named.graph.output if item.name not in given]
    if not made:
        raise ModelError(
            "every output of the model is one of its inputs, so nothing reads what its layers make and no range can be measured; "
            "use --activations none for int8 weights only, or give the model its outputs"
        )
    del named.graph.output[:]
    named.graph.output.extend(made)
    reader = _Reader(dataset, _batch_size(dataset, seed, histogram), limit, seed, progress)
    with tempfile.TemporaryDirectory(prefix="relief-onnx.") as folder, _quiet():
        source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        try:
            files.save(named, source)
            ort.quantize_static(
                source,
                target,
                reader,
                quant_format=ort.QuantFormat.QDQ,
                op_types_to_quantize=sorted({node.op_type for node in wanted}),
                nodes_to_quantize=[node.name for node in wanted],
                per_channel=per_channel,
                use_external_data_format=aside.bytes_of(named) > aside.LIMIT,
                activation_type=ort.QuantType.QInt8 if activations == "int8" else ort.QuantType.QUInt8,
                weight_type=ort.QuantType.QInt8,
                calibrate_method={
                    "minmax": ort.CalibrationMethod.MinMax, "entropy": ort.CalibrationMethod.Entropy,
                    "percentile": ort.CalibrationMethod.Percentile,
                }[method],
                # Range by range in histograms, so that memory does not grow with the samples; attention between activations stays float.
                extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True, **({"CalibStridedMinMax": 1} if histogram else {})},
            )  # fmt: skip
            result = aside.moved(files.load(target))
        except _ERRORS as error:
            Session(named, 1)  # a model that does not run is that first
            raise ModelError(
                f"onnxruntime's quantiser cannot handle this model ({type(error).__name__}: {first_line(error)}); "
                "use --activations none for int8 weights only, or leave layers alone with --skip"
            ) from error
    restored, weights = _restored(result, model, own)
    first = next(iter(dataset.batches(1, limit=1, seed=seed)))
    try:
        Session(restored).run(first.feed, None, first.source)
    except (DataError, ModelError) as error:
        fails = "run" if isinstance(error, DataError) else "load"
        raise ModelError(
            f"onnxruntime's quantiser made a model that onnxruntime does not {fails} ({first_line(error.__cause__ or error)}); "
            "use --activations none for int8 weights only, or leave layers alone with --skip"
        ) from error
    return restored, weights


def _foreign(graph: Graph) -> list[onnx.ValueInfoProto]:
    """Type and number of axes of what nodes make that are none of standard ONNX."""
    made = {name for node in graph.nodes if node.domain not in STANDARD for name in node.output if name in graph.types}
    known = ((name, *graph.types[name]) for name in sorted(made - set(graph.outputs)))
    return [onnx.helper.make_tensor_value_info(name, kind, None if shape is None else [None] * len(shape)) for name, kind, shape in known]


def _batch_size(dataset: Dataset, seed: int, histogram: bool) -> int:
    first = next(iter(dataset.batches(1, limit=1, seed=seed)))
    each = sum(value.nbytes for value in first.feed.values()) / max(first.size, 1)
    most = _LARGEST_HISTOGRAM_BATCH if histogram else _LARGEST_BATCH
    return int(max(1, min(most, _INPUT_BYTES // max(each, 1))))


def _name_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Give every node a name of its own, by which the quantiser is told what to do; returns what they were called, by those names."""
    own: dict[str, str] = {}
    for node, name in zip(model.graph.node, Graph(model).names, strict=True):
        own[name] = node.name
        node.name = name
    return own


def _restored(result: onnx.ModelProto, model: onnx.ModelProto, own: dict[str, str]) -> tuple[onnx.ModelProto, dict[str, tuple[str, str]]]:
    """The quantised nodes and initializers inside the model as it was: what the quantiser drops or adds around them is undone."""
    result, short = _short_names(result, model)
    restored = onnx.ModelProto()
    restored.CopyFrom(model)
    graph = restored.graph
    for field in ("node", "initializer", "value_info"):
        del getattr(graph, field)[:]
    for node in _in_order(result.graph.node):
        kept = graph.node.add()
        kept.CopyFrom(node)
        kept.name = own.get(node.name, "")
    stored = {item.name: item for item in result.graph.initializer}
    # In the order that they had, so that the file does not depend on how the quantiser walks.
    order = [item.name for item in model.graph.initializer if item.name in stored]
    graph.initializer.extend(stored[name] for name in (*order, *sorted(set(stored) - set(order))))
    made = {name for node in graph.node for name in node.output}
    graph.value_info.extend(item for item in model.graph.value_info if item.name in made)
    # Before IR version 4 every initializer is an input, which callers could replace: onnxruntime would not use its kernels for int8.
    restored.ir_version = max(model.ir_version, 4)
    gone = {item.name for item in model.graph.initializer if model.ir_version < 4 or item.name not in stored}
    inputs = [item for item in graph.input if item.name not in gone]
    del graph.input[:]
    graph.input.extend(inputs)
    known = {item.domain for item in model.opset_import} | {"", "ai.onnx"}
    foreign = sorted({node.domain for node in graph.node} - known)
    if foreign:
        raise ModelError(
            f"onnxruntime's quantiser needs operators of {foreign[0]}, which are not standard ONNX; use --activations none for this model"
        )
    # The quantiser's own names for what it makes of a weight.
    stored = {item.name: item for item in graph.initializer}
    weights = {}
    for item in model.graph.initializer:
        values, scale = (short.get(f"{item.name}{suffix}", "") for suffix in ("_quantized", "_scale"))
        if values in stored and scale in stored and stored[values].data_type == onnx.TensorProto.INT8 and item.name not in stored:
            weights[item.name] = (values, scale)
    return restored, weights


def _short_names(result: onnx.ModelProto, model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Tensors that the quantiser made under names of a few letters, equal constants among them once: together they take a quarter of a
    small file. Returns the new names by the old ones."""
    old = Graph(model)
    known = {*old.initializers, *old.producer, *old.uses, *old.outputs, *(item.name for item in model.graph.input)}
    renamed: dict[str, str] = {}
    seen: dict[bytes, str] = {}
    numbers = count()

    def short(name: str) -> str:
        if name and name not in known and name not in renamed:
            renamed[name] = next(free for free in (f"i{number}" for number in numbers) if free not in known)
        return renamed.get(name, name)

    shortened = onnx.ModelProto()
    shortened.CopyFrom(result)
    del shortened.graph.initializer[:]
    for item in sorted(result.graph.initializer, key=lambda item: item.name):
        if item.name in known:
            shortened.graph.initializer.append(item)
            continue
        content = onnx.TensorProto()
        content.CopyFrom(item)
        content.name = ""
        key = content.SerializeToString(deterministic=True)
        if key in seen:
            renamed[item.name] = seen[key]
            continue
        seen[key] = content.name = short(item.name)
        shortened.graph.initializer.append(content)
    for node in shortened.graph.node:
        for names in (node.input, node.output):
            for slot, name in enumerate(names):
                names[slot] = short(name)
    return shortened, renamed


def _in_order(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Every node behind those that it reads, bodies of If and Loop too, which the quantiser overlooks; else in the order given."""
    waiting: dict[str, list[onnx.NodeProto]] = {}
    pending = [(node, {*node.input} | {name for body in subgraphs(node) for name in captured(body)}) for node in nodes]
    made = {name for node, _ in pending for name in node.output if name}
    missing = {id(node): len(read & made) for node, read in pending}
    for node, read in pending:
        for name in read & made:
            waiting.setdefault(name, []).append(node)
    place = {id(node): i for i, (node, _) in enumerate(pending)}
    ready = [(i, pending[i][0]) for i in range(len(pending)) if not missing[id(pending[i][0])]]
    ordered = []
    while ready:
        _, node = heapq.heappop(ready)
        ordered.append(node)
        for reader in (reader for name in node.output for reader in waiting.get(name, ())):
            missing[id(reader)] -= 1
            if not missing[id(reader)]:
                heapq.heappush(ready, (place[id(reader)], reader))
    return ordered


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints, logs and warns about what the report says in its own words."""
    root, handler = logging.getLogger(), logging.NullHandler()
    handlers, root.handlers = root.handlers, [handler]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers
