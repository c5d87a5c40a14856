"""How good a pruned model is on a set of samples, in 0..1: 1 is as good as it gets, 0 is useless.

- `accuracy`: share of right labels (MNIST, CIFAR-10). Chance is 0.1, not 0.
- `agreement`: share of samples with the original's class, less what a coin gets: `max(0, (share - 1/k) / (1 - 1/k))` for k classes.
- `embedding`: mean cosine with the original's embedding, negative ones as 0.
- `characters`: of all frames where the original or the pruned model reads a character (not the CTC blank), the share where
  both read the same one. Plain agreement per frame would give an all-blank garbage output most of its points.
- `concordant`: the mean over outputs of the concordance `2 sum w a b / sum w (a a + b b)`, negative ones as 0, where b is how far an
  element of the original's output is from that element's mean over the samples, and a how far the pruned model's is from the same
  mean. 1 only for equal outputs; a wrong scale or offset lowers it; a model that answers the same to everything gets 0 even where its
  constants (anchor grids, a centre bias) are right. Kinder than R^2, which is 0 already when the error is as large as the signal.
  Detectors weight the errors of boxes and landmarks by the original's score there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Values64 = NDArray[np.float64]
Values = Mapping[str, Values64]  # by output name, stacked over samples: [samples, ...]
Labels = NDArray[np.int64]


def accuracy(values: Values, labels: Labels) -> float:
    """Share of samples whose largest output is the label; of the only output."""
    (logits,) = values.values()
    return float(np.mean(logits.argmax(1) == labels))


def agreement(values: Values, original: Values) -> float:
    """Share of samples with the original's class, less chance."""
    share = float(np.mean([np.mean(values[name].argmax(-1) == original[name].argmax(-1)) for name in original]))
    classes = next(iter(original.values())).shape[-1]
    return max(0.0, float((share - 1 / classes) / (1 - 1 / classes)))


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
    return float(same / either) if either else 0.0


def concordance(x: Values64, y: Values64, weight: Values64 | None = None) -> float:
    """Of what an output was (y) and is now (x), both [samples, ...], 0..1; 0 where something is not finite."""
    if not np.isfinite(x).all():
        return 0.0
    w = np.ones_like(y) if weight is None else np.broadcast_to(weight, y.shape)
    mean = (w * y).sum(0) / np.maximum(w.sum(0), 1e-12)
    a, b = x - mean, y - mean
    spread = float((w * (a * a + b * b)).sum())
    return max(0.0, 2 * float((w * a * b).sum()) / spread) if spread > 0 else 0.0


def concordant(values: Values, original: Values) -> float:
    """Mean concordance of the outputs."""
    return float(np.mean([concordance(values[name], original[name]) for name in original]))


def yolo(values: Values, original: Values) -> float:
    """Of one output [samples, 4 + classes, anchors]: mean concordance of class scores and of boxes, these weighted by the best score."""
    ((name, y),) = original.items()
    x = values[name]
    return (concordance(x[:, 4:], y[:, 4:]) + concordance(x[:, :4], y[:, :4], y[:, 4:].max(1, keepdims=True))) / 2


def yunet(values: Values, original: Values) -> float:
    """Of cls, obj, bbox and kps at strides 8, 16, 32: mean concordance; boxes and landmarks weighted by cls * obj."""
    found = []
    for name, y in original.items():
        part, stride = name.split("_")
        weight = None if part in ("cls", "obj") else np.maximum(original[f"cls_{stride}"] * original[f"obj_{stride}"], 0)
        found.append(concordance(values[name], y, weight))
    return float(np.mean(found))


AGAINST_ORIGINAL: dict[str, Callable[[Values, Values], float]] = {
    "minilm_l3": embedding,
    "ppocrv4_rec": characters,
    "nudenet_320n": yolo,
    "yunet_n": yunet,
    "vit_s_focus": concordant,
    "dtln_2": concordant,
    "ppocr_cls": agreement,
}
"""By model: the metric against the original's outputs. Models that are not here have labels and are judged by `accuracy`."""

OUTPUTS: dict[str, tuple[str, ...]] = {"minilm_l3": ("461",)}
"""Outputs that count, where not all of them do: MiniLM's file also gives token states and its inputs out."""


def describe(name: str) -> str:
    """The metric's name, for tables."""
    return AGAINST_ORIGINAL[name].__name__ if name in AGAINST_ORIGINAL else "accuracy"
