"""From scores to masks: the paper's rule, and masks as Mul nodes in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.aside import beside, tensor_of
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.nodes import subgraphs
from relief_onnx.scoring import LayerScore, Scores

__all__ = [
    "Masks",
    "applied",
    "as_stored",
    "both",
    "initializer_masks",
    "insert",
    "keep_all",
    "keep_prefix",
    "make_masks",
    "mask_of",
    "whole_units",
]

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Masks:
    """What stays.

    keep: by weight, as its first reader sees it: connections [out, in per group] or single weights [out, in per group, *kernel].
    bias_keep: by weight, [out].
    vectors: further initializers that lose entries (normalisation parameters of a unit that goes), flags in their own shape.
    """

    keep: Mapping[str, Flags]
    bias_keep: Mapping[str, Flags]
    vectors: Mapping[str, Flags] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The contents of masks.npz."""
        found: dict[str, NDArray[Any]] = {}
        for weight, keep in self.keep.items():
            found[f"{weight}/keep"] = keep
            found[f"{weight}/bias_keep"] = self.bias_keep[weight]
        return found


def keep_prefix(shares: NDArray[np.float64], alpha: float) -> Flags:
    """Per row of [out, n] shares: the shortest prefix, sorted descending, whose sum reaches alpha of the row's total.

    Kept by index with a stable sort, so ties never remove more than asked; alpha 1 keeps all that is not exactly 0.
    """
    if alpha >= 1.0:
        return shares > 0
    order = np.argsort(-shares, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(shares, order, 1), 1)
    # Everything up to and including the first entry that reaches alpha: those before it have not reached it yet.
    before = np.concatenate([np.zeros((len(shares), 1)), running[:, :-1]], 1)
    wanted = (before < alpha * running[:, -1:]) & (running[:, -1:] > 0)
    keep = np.zeros(shares.shape, bool)
    np.put_along_axis(keep, order, wanted, 1)
    return keep


def _layer_masks(layer: Layer, score: LayerScore, alpha: float, prune_bias: bool) -> tuple[Flags, Flags]:
    rows = score.score.reshape(layer.out_channels, -1)
    keep = keep_prefix(np.concatenate([rows, score.bias_score[:, None]], 1), alpha)
    removable = prune_bias and layer.bias is not None and not layer.bias.shared
    bias = keep[:, -1] if removable else np.ones(layer.out_channels, bool)
    return keep[:, :-1].reshape(score.score.shape), bias


def make_masks(plan: Plan, scores: Scores, weights: frozenset[str], alpha: Callable[[Layer], float], prune_bias: bool) -> Masks:
    """Masks of the chosen weights, shaped as the scores. A shared weight loses only what every one of its readers lets go."""
    keeps: dict[str, Flags] = {}
    biases: dict[str, Flags] = {}
    for weight, layers in plan.by_weight().items():
        if weight not in weights:
            continue
        made = [_layer_masks(layer, scores[layer.name], alpha(layer), prune_bias) for layer in layers]
        if len(layers) == 1:
            keeps[weight], biases[weight] = made[0]
        else:
            keeps[weight] = _united(layers, [keep for keep, _ in made])
            biases[weight] = np.ones(layers[0].out_channels, bool)
    return Masks(keeps, biases)


def keep_all(plan: Plan, weights: frozenset[str]) -> Masks:
    """Masks of connections that remove nothing from the chosen weights."""
    layers = {weight: readers[0] for weight, readers in plan.by_weight().items() if weight in weights}
    return Masks(
        {weight: np.ones(layer.view.shape[:2], bool) for weight, layer in layers.items()},
        {weight: np.ones(layer.out_channels, bool) for weight, layer in layers.items()},
    )


def both(first: Masks, second: Masks) -> Masks:
    """What stays by both masks."""
    parts = []
    for one, other in ((first.keep, second.keep), (first.bias_keep, second.bias_keep), (first.vectors, second.vectors)):
        parts.append(
            {name: one[name] & other[name] if name in one and name in other else {**one, **other}[name] for name in {**one, **other}}
        )
    return Masks(*parts)


def as_stored(layer: Layer, values: NDArray[Any]) -> NDArray[Any]:
    """Numbers per connection or single weight, as a layer sees them, in the layout of the initializer."""
    thin = values.reshape(*values.shape, *(1,) * (len(layer.view.shape) - values.ndim))
    return np.asarray(layer.view.invert(np.broadcast_to(thin, layer.view.shape)))


def whole_units(layers: tuple[Layer, ...], keep: Flags) -> Flags:
    """Masks as the first reader of a weight sees it, grown until whole kernels stay for every reader of a shared one."""
    if len(layers) == 1:
        return keep
    return _united(layers, [mask_of(layers, layer, keep) for layer in layers])


def mask_of(layers: tuple[Layer, ...], layer: Layer, keep: Flags) -> Flags:
    """The mask of a weight, held as its first reader sees it, as another of its readers does."""
    return keep if layer is layers[0] else _whole(layer, as_stored(layers[0], keep), _like(layer, keep))


def _like(layer: Layer, keep: Flags) -> tuple[int, ...]:
    """The shape of a layer's mask, of connections or single weights as `keep` is."""
    return layer.view.shape if keep.ndim > 2 else layer.view.shape[:2]


def _united(layers: tuple[Layer, ...], keeps: list[Flags]) -> Flags:
    """The union over readers, each in its own layout; repeated until whole kernels, where masks are of kernels, agree for all of them."""
    total = np.zeros(layers[0].view.source, bool)
    for layer, keep in zip(layers, keeps, strict=True):
        total |= as_stored(layer, keep)
    while True:
        grown = total
        for layer, keep in zip(layers, keeps, strict=True):
            whole = _whole(layer, grown, keep.shape)
            grown = grown | as_stored(layer, whole)
        if np.array_equal(grown, total):
            return _whole(layers[0], total, keeps[0].shape)
        total = grown


def _whole(layer: Layer, flags: Flags, shape: tuple[int, ...]) -> Flags:
    """Units of a layer's mask of that shape, connections or single weights, of which any weight is flagged."""
    found: Flags = np.any(layer.view.apply(flags).reshape(*shape, -1), axis=-1)
    return found


def _thin(keep: Flags, rank: int) -> Flags:
    """With further axes of size 1, so that it broadcasts against a weight of that rank."""
    return keep.reshape(*keep.shape, *(1,) * (rank - keep.ndim))


def initializer_masks(plan: Plan, masks: Masks) -> dict[str, Flags]:
    """For each initializer that loses entries: a mask that broadcasts against it."""
    found: dict[str, Flags] = dict(masks.vectors)
    for weight, layers in plan.by_table().items():
        if weight in masks.keep and not masks.keep[weight].all():
            found[weight] = found.get(weight, np.True_) & as_stored(layers[0], masks.keep[weight])
    for weight, layers in plan.by_weight().items():
        layer = layers[0]
        if weight in masks.keep and not masks.keep[weight].all():
            keep = masks.keep[weight]
            found[weight] = _thin(keep, len(layer.view.shape)) if not layer.view.steps else as_stored(layer, keep)
        if weight in masks.bias_keep and layer.bias is not None and not masks.bias_keep[weight].all():
            found[layer.bias.name] = layer.bias.view.invert(masks.bias_keep[weight])
    return found


def insert(graph: Graph, flags: Mapping[str, Flags]) -> onnx.ModelProto:
    """The masked model: every masked initializer W is read through Mul(W, W/mask). A valid ONNX file that can be opened and retrained."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    renamed: dict[str, str] = {}
    nodes = []
    for name, keep in flags.items():
        dtype = graph.array(name).dtype
        wide = graph.initializers[name].data_type == onnx.TensorProto.BFLOAT16  # onnxruntime has no Mul of these
        dtype = np.dtype(np.float32) if wide else dtype
        mask = tensor_of(np.ascontiguousarray(keep.astype(dtype)), f"{name}/mask", graph.initializers[name])
        model.graph.initializer.append(mask)
        if model.ir_version < 4:
            model.graph.input.append(helper.make_tensor_value_info(mask.name, mask.data_type, mask.dims))
        renamed[name] = f"{name}/masked"
        source, target = (f"{name}/wide", f"{name}/masked/wide") if wide else (name, renamed[name])
        if wide:
            nodes.append(helper.make_node("Cast", [name], [source], name=source, to=onnx.TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [source, mask.name], [target], name=f"{name}/masked"))
        if wide:
            nodes.append(helper.make_node("Cast", [target], [renamed[name]], name=target, to=onnx.TensorProto.BFLOAT16))
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            if name in renamed:
                node.input[slot] = renamed[name]
        for body in subgraphs(node):
            _rename_captured(body, renamed)
    old = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    return model


def _rename_captured(body: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    for node in body.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = renamed.get(name, name)
        for inner in subgraphs(node):
            _rename_captured(inner, renamed)


def applied(graph: Graph, flags: Mapping[str, Flags]) -> dict[str, NDArray[Any]]:
    """The initializers with their masks multiplied in; what goes is +0."""
    arrays = {name: graph.array(name) for name in flags}
    return {name: beside(np.where(keep, arrays[name], np.zeros((), arrays[name].dtype)), arrays[name]) for name, keep in flags.items()}
