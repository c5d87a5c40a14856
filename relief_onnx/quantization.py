"""From floats to int8: weights, and activations where onnxruntime has kernels for them. The order of the steps, and what is eligible."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.aside import array_of, scoped, whole
from relief_onnx.carried import uncarried, with_weights_outside
from relief_onnx.data import ImageOptions
from relief_onnx.errors import ModelError, NothingQuantizedError, OptionError, VerificationError
from relief_onnx.fitted import Data, samples_for
from relief_onnx.folding import fold_norms
from relief_onnx.graph import Graph
from relief_onnx.int8 import Stored, kept_axes, store
from relief_onnx.layers import Layer, Plan, find
from relief_onnx.lowering import STORED_PASSES, lower
from relief_onnx.nodes import STANDARD, every_node
from relief_onnx.options import Options, resolve
from relief_onnx.pack import pack, unpack
from relief_onnx.quantize_report import Evidence, Stage, build_quantize_report
from relief_onnx.quantizer import METHODS, quantize_activations, version_refusal
from relief_onnx.report import to_json
from relief_onnx.shadows import unshadowed
from relief_onnx.verify import verify_packed

__all__ = ["ACTIVATIONS", "Quantized", "quantize"]

ACTIVATIONS = ("uint8", "int8", "none")
# First opset in which QuantizeLinear knows scales per channel.
_PER_CHANNEL_OPSET = 13
_ALREADY = re.compile(r"(Dynamic)?QuantizeLinear|DequantizeLinear|QLinear\w+|\w+Integer|DynamicQuantize\w+|QGemm|QAttention|MatMulNBits")
# Operators that pass 8 bit values on; the quantiser touches them only behind something that is quantised.
_DIRECT = frozenset({"Relu", "Clip", "MaxPool", "AveragePool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice"})
# Those of them to whose range the quantiser narrows what they read.
_CLIPPING = frozenset({"Relu", "Clip"})
# Quantised only where all that they join comes from convolutions: in transformers 8 bits are too few for a residual stream or a mask.
_JOINS = frozenset({"Add", "Concat", "GlobalAveragePool"})
_HALF = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns: the shipped ModelProto, the same model with nothing packed, and the report."""

    model: onnx.ModelProto
    dense: onnx.ModelProto
    report: Mapping[str, Any]


@dataclass(frozen=True)
class _Candidates:
    """Which weights may be quantised: the axes along which each has scales of its own; and why the others are left alone."""

    graph: Graph
    plan: Plan
    axes: Mapping[str, tuple[int, ...]]
    reasons: Mapping[str, str]


@scoped("model", "dense")
def quantize(
    source: files.ModelSource,
    data: Data,
    *,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    images: ImageOptions | None = None,
    original: files.ModelSource | None = None,
    activations: str | None = None,
    per_channel: bool | None = None,
    method: str | None = None,
    save_report: str | os.PathLike[str] | None = None,
    progress: calibrate.Progress = lambda stage, done, total: None,
    **given: Any,
) -> Quantized:
    """Quantise a model, pruned or not, to int8, verify it in onnxruntime and, with `output`, write it.

    activations: "uint8" (default), "int8", or "none" for int8 weights that are floats again when the model is loaded. per_channel: a scale
    per neuron or filter (default). method: "minmax" (default), "entropy" or "percentile". original: the model before pruning, for the
    report. Further keywords as for `prune`: skip, only, samples, seed, threads, storage.

    Raises ReliefError subclasses: bad input (exit code 1), VerificationError (3), NothingQuantizedError (4). Then nothing is written.
    """
    run = _options(given)
    activations, per_channel, method = _choices(activations, per_channel, method)
    seconds: dict[str, float] = {}
    with _clock(seconds, "load"):
        path = None if isinstance(source, onnx.ModelProto) else Path(source)
        name = "the given model" if path is None else str(path)
        loaded = files.load(source)
        given_as, origin = files.given_identity(source, loaded), files.origin_of(source)
        if output is not None:
            files.check_target(Path(output), force)
        if save_report is not None:
            files.check_target(Path(save_report), force=True)
        before = None if original is None else _first_stage(original)
        model = unpack(loaded)
        _check_floats(model, name)
        dataset = samples_for(model, data, images)
        whole_model = with_weights_outside(uncarried(unshadowed(files.hoist(model))))
        lowered = lower(whole_model, STORED_PASSES)
        base = lowered.model
    notes: list[str] = []
    fine = _fit_version(base, name, per_channel, notes) if activations != "none" else per_channel
    found = _candidates(base, run, per_channel)
    base, folded = fold_norms(base)
    found = _Candidates(Graph(base), find(Graph(base)), found.axes, found.reasons) if folded else found
    stored_as_int8, stored, too_small = store(base, found.axes)
    only_weights = lowered.restored(stored_as_int8)
    dense, integers = only_weights, False
    nodes = _nodes(found, fine, notes) if activations != "none" else frozenset()
    if nodes:
        with _clock(seconds, "calibrate"):
            dense, names = quantize_activations(
                base, nodes, dataset, activations=activations, per_channel=fine, method=method, limit=run.samples, seed=run.seed,
                progress=progress,
            )  # fmt: skip
        with_activations = _with_activations(dense, names)
        dense, rest, too_small = store(dense, {weight: axes for weight, axes in found.axes.items() if weight not in with_activations})
        dense, stored, integers = lowered.restored(dense), {**with_activations, **rest}, bool(with_activations)
    elif activations != "none":
        notes.append("no layer has kernels for int8 activations; the weights alone are int8")
    reasons = {**found.reasons, **too_small}
    if not stored:
        raise _nothing(name, reasons)
    _check_zeros(found.graph, stored)
    with _clock(seconds, "pack"):
        shipped, packed = pack(dense, _packable(dense, stored)) if run.storage == "auto" else (dense, ())
    with _clock(seconds, "verify"):
        verification = verify_packed(model, dense, shipped, dataset, seed=run.seed, threads=run.threads)
    stages = [
        *([] if before is None else [before]),
        Stage("input", loaded, given_as[1]),
        Stage("weights int8", only_weights),
        *([Stage("weights and activations int8", dense)] if integers else []),
        *([Stage("packed", shipped)] if run.storage == "auto" else []),
    ]
    evidence = Evidence(
        path, given_as, None if output is None else Path(output), model, base, shipped, found.graph, found.plan, stored, reasons, packed,
        folded, {"activations": activations, "per_channel": per_channel, "method": method, **_shared(run)}, tuple(notes), origin,
    )  # fmt: skip
    report = build_quantize_report(evidence, stages, verification, dataset, run, seconds, progress)
    if save_report is not None:
        files.write_atomically(Path(save_report), to_json(report))
    if output is not None:
        files.save(shipped, Path(output), origin)
    return Quantized(whole(shipped), whole(dense), report)


# ---- options


_SHARED = ("skip", "only", "storage", "samples", "seed", "threads")


def _options(given: Mapping[str, Any]) -> Options:
    for key in given:
        if key not in _SHARED:
            raise OptionError(f"there is no option {key!r} of quantize; there are {', '.join(_SHARED)}")
    return resolve(None, {}, given)


def _shared(run: Options) -> dict[str, Any]:
    return {key: getattr(run, key) for key in _SHARED}


def _choices(activations: str | None, per_channel: bool | None, method: str | None) -> tuple[str, bool, str]:
    activations, method = activations or ACTIVATIONS[0], method or METHODS[0]
    for key, value, known in (("activations", activations, ACTIVATIONS), ("method", method, METHODS)):
        if value not in known:
            raise OptionError(f"{key} is {value!r}; choose one of {', '.join(known)}")
    return activations, per_channel is not False, method


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _first_stage(source: files.ModelSource) -> Stage:
    model = files.load(source)
    return Stage("original", model, files.given_identity(source, model)[1])


# ---- what can be quantised


def _check_floats(model: onnx.ModelProto, name: str) -> None:
    """Refuse a model that holds quantised parts already."""
    nodes = list(every_node(model.graph))
    integers = {item.name for item in model.graph.initializer if item.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    found = [node.op_type for node in nodes if _ALREADY.fullmatch(node.op_type)]
    # Ours are stored as int8 behind a Cast.
    found += ["Cast" for node in nodes if node.op_type == "Cast" and node.input[0] in integers]
    if found:
        what = f"it has {found[0]} nodes" if found[0] != "Cast" else "it stores weights as 8 bit integers"
        raise NothingQuantizedError(f"{name} is already quantised ({what}); give the float model that it was made from")


def _fit_version(model: onnx.ModelProto, name: str, per_channel: bool, notes: list[str]) -> bool:
    """Whether scales per channel are possible with int8 activations. Raises ModelError where those are not possible at all."""
    opset = Graph(model).opset
    refusal = version_refusal(opset)
    if not refusal and any(item.data_type in _HALF for item in model.graph.initializer):
        refusal = "onnxruntime has no int8 kernels beside half precision"
    if refusal:
        raise ModelError(f"{name} cannot have int8 activations: {refusal}; use --activations none for int8 weights only")
    if per_channel and opset < _PER_CHANNEL_OPSET:
        notes.append(
            f"opset {opset} has no scales per channel beside int8 activations (opset {_PER_CHANNEL_OPSET} or newer has), so the weights of "
            "such layers have one scale each; --activations none has scales per channel at any opset"
        )
        return False
    return per_channel


def _candidates(model: onnx.ModelProto, run: Options, per_channel: bool) -> _Candidates:
    graph = Graph(model)
    plan = find(graph)
    axes, reasons = kept_axes(graph, plan, per_channel)
    readers: dict[str, list[str]] = {}
    for weight, reader in [(item.weight, item.name) for item in plan.layers] + [(item.weight, item.node) for item in plan.unranked]:
        readers.setdefault(weight, [weight]).append(reader)
    for weight in list(axes):
        if run.skip and any(re.search(run.skip, item) for item in readers[weight]):
            reasons[weight] = f"--skip {run.skip} names it"
        elif run.only and not any(re.search(run.only, item) for item in readers[weight]):
            reasons[weight] = f"--only {run.only} does not name it"
    return _Candidates(graph, plan, {weight: axis for weight, axis in axes.items() if weight not in reasons}, reasons)


def _weight_only(layer: Layer, sharing: Iterable[Layer]) -> str:
    """Why scales per channel leave the layer with an int8 weight but no int8 activations; empty where they do not."""
    if layer.op == "ConvTranspose" and layer.groups > 1 and layer.bias is not None:
        return "onnxruntime's quantiser has scales for one of its groups and a bias for all"
    if layer.op == "MatMul" and len(layer.view.source) > 2:
        return "not every onnxruntime has a kernel for a product with scales per channel of a weight that has more than two axes"
    if len({other.view.source_axis(0) for other in sharing}) > 1:
        return "the neurons of the layers that share it lie along different axes of it"
    return ""


def _passes_on(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether 8 bit values can go through; what others see must not get the range of what a Relu behind it leaves."""
    if node.op_type not in _CLIPPING:
        return node.op_type in _DIRECT
    # The quantiser itself looks at other readers, but not at outputs of the model and bodies; it drops the node, and bodies would read
    # what is not clipped.
    uses = [use for name in (node.input[0], node.output[0]) for use in graph.uses.get(name, ())]
    return not graph.is_output(node.input[0]) and all(use.slot >= 0 for use in uses)


def _nodes(found: _Candidates, per_channel: bool, notes: list[str]) -> frozenset[int]:
    """The nodes that are to read and write 8 bit values; empty where no layer can. notes: takes what keeps others from it."""
    graph = found.graph
    layers = {
        layer.node: layer
        for layer in found.plan.single().values()
        if layer.weight in found.axes and graph.nodes[layer.node].input[1] == layer.weight and not graph.is_output(layer.weight)
    }
    readers = found.plan.by_weight()
    alone = {i: why for i, layer in layers.items() if per_channel and (why := _weight_only(layer, readers[layer.weight]))}
    notes += dict.fromkeys(f"{layers[i].weight} is int8 as a weight only: {why}" for i, why in alone.items())
    if layers.keys() == alone.keys():
        return frozenset()
    known: dict[int, bool] = {i: layer.is_convolution and i not in alone for i, layer in layers.items()}
    chosen = set(layers) - alone.keys()
    for i, node in enumerate(graph.nodes):
        if i in layers or node.domain not in STANDARD:
            continue
        # Nodes come in the order in which they run, so what they read is known.
        known[i] = node.op_type in _DIRECT | _JOINS and all(
            name in graph.producer and known.get(graph.producer[name], False)
            for name in (node.input if node.op_type in _JOINS else node.input[:1])
        )
        if _passes_on(graph, node) or (node.op_type in _JOINS and known[i]):
            chosen.add(i)
    return frozenset(chosen)


def _with_activations(model: onnx.ModelProto, names: Mapping[str, tuple[str, str]]) -> dict[str, Stored]:
    """The weights that onnxruntime's quantiser stored as int8."""
    tensors = {item.name: array_of(item) for item in model.graph.initializer if item.name in {*sum(names.values(), ())}}
    return {weight: Stored(values, tensors[values], tensors[scale].size > 1, "int8") for weight, (values, scale) in names.items()}


def _check_zeros(graph: Graph, stored: Mapping[str, Stored]) -> None:
    for weight, item in stored.items():
        if np.any(item.values[graph.array(weight) == 0]):
            raise VerificationError(f"zeros of {weight} did not stay zeros; nothing was written, please report this model")


def _packable(model: onnx.ModelProto, stored: Mapping[str, Stored]) -> list[str]:
    """The int8 weights, and the layers' weights that stayed floats."""
    tensors = {item.name for item in model.graph.initializer}
    floats = {layer.weight for layer in find(Graph(model)).layers} & tensors
    return sorted({item.name for item in stored.values()} | floats)


def _nothing(name: str, reasons: Mapping[str, str]) -> NothingQuantizedError:
    rows = list(reasons.items())
    if not rows:
        return NothingQuantizedError(f"nothing in {name} could be quantised: it has no weights of two axes or more")
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return NothingQuantizedError(f"nothing in {name} could be quantised: {rows[0][0]}: {rows[0][1]}{more}", rows)
