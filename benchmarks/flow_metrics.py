"""How good a pruned model is on a set of samples, in 0..1: 1 is as good as it gets, 0 is useless.

- `accuracy`: share of right labels (MNIST, CIFAR-10). Chance is 0.1, not 0.
- `agreement`: share of samples with the original's class, less what a coin gets: `max(0, (share - 1/k) / (1 - 1/k))` for k classes.
- `embedding`: mean cosine with the original's embedding, negative ones as 0.
- `characters`: of all frames where the original or the pruned model reads a character (not the CTC blank), the share where
  both read the same one. Plain agreement per frame would give an all-blank garbage output most of its points.
- `explained`: the mean over outputs of `max(0, R^2)`, where R^2 = 1 - sum w (y' - y)^2 / sum w (y - mean y)^2 and the mean is that of
  each output element over the samples. So a model that answers the same to everything gets 0, even where its constants
  (anchor grids, a centre bias) are right. Detectors weight the errors of boxes and landmarks by the original's score there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Values = Mapping[str, NDArray[np.float64]]  # by output name, stacked over samples: [samples, ...]
Labels = NDArray[np.int64]


def accuracy(values: Values, labels: Labels) -> float:
    """Share of samples whose largest output is the label; of the only output."""
    (logits,) = values.values()
    return float((logits.argmax(1) == labels).mean())


def agreement(values: Values, original: Values) -> float:
    """Share of samples with the original's class, less chance."""
    share = float(np.mean([np.mean(values[name].argmax(-1) == original[name].argmax(-1)) for name in original]))
    classes = next(iter(original.values())).shape[-1]
    return max(0.0, (share - 1 / classes) / (1 - 1 / classes))


def embedding(values: Values, original: Values) -> float:
    """Mean cosine of vectors [samples, features]."""
    cosines = []
    for name, y in original.items():
        x = values[name]
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosines.append(np.where(norms > 0, (x * y).sum(1) / np.where(norms > 0, norms, 1), 0))
    return float(np.mean(np.maximum(np.concatenate(cosines), 0)))


def characters(values: Values, original: Values, blank: int = 0) -> float:
    """Right characters over frames with a character, of [samples, frames, classes]."""
    same = either = 0
    for name, y in original.items():
        read, wanted = values[name].argmax(-1), y.argmax(-1)
        some = (read != blank) | (wanted != blank)
        same += int(np.sum(some & (read == wanted)))
        either += int(np.sum(some))
    return same / either if either else 0.0


def r_squared(y: NDArray[np.float64], wanted: NDArray[np.float64], weight: NDArray[np.float64] | None = None) -> float:
    """max(0, R^2) with the mean over samples as what must be beaten; 0 where something is not finite."""
    if not np.isfinite(y).all():
        return 0.0
    w = np.ones_like(wanted) if weight is None else np.broadcast_to(weight, wanted.shape)
    mean = (w * wanted).sum(0) / np.maximum(w.sum(0), 1e-12)
    spread = float((w * (wanted - mean) ** 2).sum())
    return max(0.0, 1 - float((w * (y - wanted) ** 2).sum()) / spread) if spread > 0 else 0.0


def explained(values: Values, original: Values) -> float:
    """Mean of max(0, R^2) over outputs."""
    return float(np.mean([r_squared(values[name], original[name]) for name in original]))


def yolo(values: Values, original: Values) -> float:
    """Of one output [samples, 4 + classes, anchors]: the mean of class scores' R^2 and of boxes' R^2, weighted by the best score."""
    ((name, y),) = original.items()
    x = values[name]
    return (r_squared(x[:, 4:], y[:, 4:]) + r_squared(x[:, :4], y[:, :4], y[:, 4:].max(1, keepdims=True))) / 2


def yunet(values: Values, original: Values) -> float:
    """Of cls, obj, bbox and kps at strides 8, 16, 32: mean R^2; boxes and landmarks weighted by cls * obj."""
    found = []
    for name, y in original.items():
        part, stride = name.split("_")
        weight = None if part in ("cls", "obj") else np.maximum(original[f"cls_{stride}"] * original[f"obj_{stride}"], 0)
        found.append(r_squared(values[name], y, weight))
    return float(np.mean(found))


AGAINST_ORIGINAL: dict[str, Callable[[Values, Values], float]] = {
    "minilm_l3": embedding,
    "ppocrv4_rec": characters,
    "nudenet_320n": yolo,
    "yunet_n": yunet,
    "vit_s_focus": explained,
    "dtln_2": explained,
    "ppocr_cls": agreement,
}
"""By model: the metric against the original's outputs. Models that are not here have labels and are judged by `accuracy`."""

OUTPUTS: dict[str, tuple[str, ...]] = {"minilm_l3": ("461",)}
"""Outputs that count, where not all of them do: MiniLM's file also gives token states and its inputs out."""


def describe(name: str) -> str:
    """The metric's name, for tables."""
    return AGAINST_ORIGINAL[name].__name__ if name in AGAINST_ORIGINAL else "accuracy"
