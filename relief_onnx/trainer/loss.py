"""Losses in torch, each a mean over rows: how far outputs are from the original's, and from labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.errors import RecipeError
from relief_onnx.trainer.heads import Head

__all__ = ["Objective", "distance", "label_loss", "quality"]

TINY = 1e-30


def _log_probabilities(head: Head, values: Tensor) -> Tensor:
    """Log-probabilities with classes on the last axis."""
    values = values.float()
    values = values.flatten(head.axis) if head.flat else values.movedim(head.axis, -1)
    if head.form == "logits":
        return F.log_softmax(values, -1)
    return values.clamp(min=-100.0) if head.form == "log-probabilities" else values.clamp_min(TINY).log()


def _probability(head: Head, values: Tensor) -> Tensor:
    return torch.sigmoid(values.float()) if head.form == "binary logits" else values.float().clamp(0.0, 1.0)


def distance(head: Head, student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """How far one output is from the original's: 0 where equal. scale: the variance of the original's output, for mse."""
    if head.kind == "kl":
        log_s, log_t = _log_probabilities(head, student), _log_probabilities(head, teacher)
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
    if head.kind == "bce":
        p = _probability(head, teacher)
        entropy = F.binary_cross_entropy(p, p)
        if head.form == "binary logits":
            return F.binary_cross_entropy_with_logits(student.float(), p) - entropy
        return F.binary_cross_entropy(_probability(head, student), p) - entropy
    s, t = student.float(), teacher.float()
    if head.kind == "cosine":
        s, t = (value.reshape(len(value), -1) if value.dim() == 2 else value.reshape(-1, value.shape[-1]) for value in (s, t))
        return 1.0 - F.cosine_similarity(s, t, -1).mean()
    return (s - t).square().mean() / scale


def label_loss(head: Head, student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class numbers, mean squared error for float targets. Raises RecipeError where shapes do not fit."""
    if labels.is_floating_point():
        if student.shape != labels.shape:
            raise RecipeError(
                f"the labels have shape {list(labels.shape)}, output {head.name} has {list(student.shape)}; give one target per value"
            )
        return (student.float() - labels).square().mean()
    if head.form == "sigmoid" and student.numel() == len(labels):
        if int(labels.max()) > 1:
            raise RecipeError(f"output {head.name} has one probability for each sample, but there is a label {int(labels.max())}")
        return F.binary_cross_entropy(_probability(head, student).reshape(-1), labels.float())
    scores = _log_probabilities(head, student) if head.form != "sigmoid" else _probability(head, student).clamp_min(TINY).log()
    scores = scores.reshape(-1, scores.shape[-1])
    if len(scores) != len(labels) or int(labels.max()) >= scores.shape[-1]:
        raise RecipeError(
            f"output {head.name} has scores of {scores.shape[-1]} classes for {len(scores)} rows, which the {len(labels)} labels up to "
            f"{int(labels.max())} do not fit"
        )
    return F.nll_loss(scores, labels)


class Objective:
    """The loss of a run: label_weight x labels + (1 - label_weight) x the distances of all outputs."""

    def __init__(self, heads: Sequence[Head], labelled: Head | None, label_weight: float, scales: Mapping[str, float]) -> None:
        self._heads = [head for head in heads if head.kind != "none"]
        self._labelled, self.label_weight, self._scales = labelled, label_weight, scales

    @property
    def teaches(self) -> bool:
        """Whether the original's outputs are needed."""
        return self.label_weight < 1.0

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """The loss of one batch."""
        parts: list[Tensor] = []
        if self.teaches:
            scale = self._scales
            found = [distance(head, student[head.name], teacher[head.name], scale.get(head.name, 1.0)) for head in self._heads]
            parts.append((1.0 - self.label_weight) * torch.stack(found).sum())
        if self.label_weight > 0 and self._labelled is not None and labels is not None:
            parts.append(self.label_weight * label_loss(self._labelled, student[self._labelled.name], labels))
        return torch.stack(parts).sum()


def quality(head: Head, student: Tensor, truth: Tensor) -> float:
    """Of one batch, summed over rows: how many have the right class (class numbers), the original's top class, or their cosine with it."""
    if not truth.is_floating_point():
        scores = student.reshape(len(truth), -1)
        return float(((scores.argmax(-1) if scores.shape[-1] > 1 else (scores[:, 0] > 0.5).long()) == truth).sum())
    s, t = student.float(), truth.float()
    if head.form in ("logits", "probabilities", "log-probabilities"):
        s, t = (value.flatten(head.axis) if head.flat else value.movedim(head.axis, -1) for value in (s, t))
        same = (s.argmax(-1) == t.argmax(-1)).float()
        return float(same.reshape(len(same), -1).mean(1).sum())
    s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
    return float(F.cosine_similarity(s, t, -1).sum())
