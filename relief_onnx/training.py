"""The choices of a retraining run: a frozen value with its checks. Needs no torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from relief_onnx.errors import OptionError

__all__ = ["LOSSES", "TRAINING_CHOICES", "TRAINING_FIELDS", "Training", "parse_training", "parse_value", "unimproved"]

# What an output's loss can be; auto looks at the graph.
LOSSES = ("auto", "kl", "bce", "mse", "cosine", "none")
AUGMENTATIONS = ("flip", "crop")
# Learning rates where none is given.
RATES: Mapping[str, float] = {"adam": 1e-3, "sgd": 1e-2}


@dataclass(frozen=True)
class Training:
    """How weights are trained again under masks.

    epochs, batch: passes over the samples, samples per step. learning_rate: None is 0.001 for adam, 0.01 for sgd. momentum: of sgd.
    schedule: of the learning rate; `step` multiplies it by 0.1 at each of `milestones` (shares of all epochs). warmup: epochs in which it
    rises from 0. clip: largest norm of all gradients together. loss: (output or "" for all, kind) pairs. label_weight: what labels count
    for, the rest is the original's outputs; None is 1 for `labels`, else 0. validation: share of the samples that is only looked at.
    patience: epochs without a better validation loss before training stops. augment: "flip", "crop".
    recalibrate: statistics of BatchNormalization measured again before training. iterations: rounds of score, mask and training.
    rewind: file with the weights that every round starts from. max_drop: points of validation accuracy or agreement that may be lost.
    checkpoint: seconds between two notes of where training stands.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float | None = None
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5,)
    warmup: float = 0.0
    clip: float | None = None
    loss: tuple[tuple[str, str], ...] = ()
    label_weight: float | None = None
    validation: float = 0.1
    patience: int | None = None
    augment: tuple[str, ...] = ()
    device: str = "cpu"
    precision: str = "full"
    recalibrate: str = "auto"
    iterations: int = 1
    rewind: str | None = None
    max_drop: float | None = None
    checkpoint: float = 60.0

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    def labels_count(self, repair: str) -> float:
        """What labels count for, in [0, 1]."""
        return self.label_weight if self.label_weight is not None else 1.0 if repair == "labels" else 0.0


TRAINING_FIELDS = tuple(item.name for item in fields(Training))

TRAINING_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("adam", "sgd"),
    "schedule": ("cosine", "step", "constant"),
    "device": ("cpu", "cuda"),
    "precision": ("full", "mixed"),
    "recalibrate": ("auto", "on", "off"),
}

# Bounds of numbers: least, whether that itself is allowed, largest.
_WHOLE: Mapping[str, int] = {"epochs": 0, "batch": 1, "patience": 1, "iterations": 1}
_REAL: Mapping[str, tuple[float, bool, float]] = {
    "learning_rate": (0.0, False, math.inf), "momentum": (0.0, True, 1.0), "weight_decay": (0.0, True, math.inf),
    "warmup": (0.0, True, math.inf), "clip": (0.0, False, math.inf), "label_weight": (0.0, True, 1.0), "validation": (0.0, True, 0.9),
    "checkpoint": (0.0, False, math.inf),
}  # fmt: skip


def parse_training(values: Mapping[str, Any], base: Training = Training()) -> Training:
    """`base` with these values, each checked. Raises OptionError with one sentence."""
    found = replace(base, **{key: parse_value(key, value) for key, value in values.items() if value is not None})
    if found.precision == "mixed" and found.device != "cuda":
        raise OptionError("precision mixed works on a GPU only; add --device cuda, or leave it out")
    return found


def unimproved(training: Training, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each round that shipped the weights that it started from, as no epoch was better."""
    return [
        f"no epoch of training in iteration {row['iteration']} was better on the samples set aside than the weights before it, "
        f"which stay; lower --learning-rate (now {training.rate:g})"
        for row in rounds
        if row["epochs"] and row["epoch_shipped"] == 0
    ]


def parse_value(key: str, value: Any) -> Any:
    """One value as it is stored. Raises OptionError where it means nothing, whatever the other options are."""
    shown = key.replace("_", "-")
    if key in _WHOLE:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < _WHOLE[key]:
            raise OptionError(f"{shown} is {value!r}; it must be a whole number, {_WHOLE[key]} or more")
        return int(value)
    if key in _REAL:
        least, closed, most = _REAL[key]
        good = not isinstance(value, bool) and isinstance(value, numbers.Real) and least <= float(value) <= most
        if not good or not math.isfinite(value) or (value == least and not closed):
            bounds = f"{least:g} or more" if closed else f"above {least:g}"
            raise OptionError(
                f"{shown} is {value!r}; it must be a number, {bounds}" + ("" if most == math.inf else f" and at most {most:g}")
            )
        return float(value)
    if key in TRAINING_CHOICES:
        if value not in TRAINING_CHOICES[key]:
            raise OptionError(f"{shown} is {value!r}; choose one of {', '.join(TRAINING_CHOICES[key])}")
        return value
    return _OTHERS[key](value)


def _loss(value: Any) -> tuple[tuple[str, str], ...]:
    items = [value] if isinstance(value, str) else list(value.items()) if isinstance(value, Mapping) else list(value)
    found = []
    for item in items:
        name, _, kind = item.rpartition("=") if isinstance(item, str) else (item[0], "", item[1])
        if kind not in LOSSES:
            raise OptionError(f"loss is {kind!r}; write KIND or OUTPUT=KIND with one of {', '.join(LOSSES)}")
        found.append((str(name), str(kind)))
    return tuple(found)


def _augment(value: Any) -> tuple[str, ...]:
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    for name in names:
        if name not in AUGMENTATIONS:
            raise OptionError(f"augment is {name!r}; choose from {', '.join(AUGMENTATIONS)}, with commas between them")
    return tuple(name for name in AUGMENTATIONS if name in names)


def _milestones(value: Any) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        found = (0.0,)
    if not all(0.0 < share < 1.0 for share in found):
        raise OptionError(f"milestones is {value!r}; give shares of the epochs between 0 and 1, such as 0.5,0.75")
    return tuple(sorted(found))


def _max_drop(value: Any) -> float:
    """Points, from "1%", "1" or 1."""
    try:
        found = float(str(value).strip().removesuffix("%"))
    except ValueError:
        found = -1.0
    if isinstance(value, bool) or not 0.0 <= found <= 100.0:
        raise OptionError(f"max-drop is {value!r}; give the points that may be lost, from 0 to 100, such as 1%")
    return found


_OTHERS: Mapping[str, Any] = {"loss": _loss, "augment": _augment, "milestones": _milestones, "max_drop": _max_drop, "rewind": str}
