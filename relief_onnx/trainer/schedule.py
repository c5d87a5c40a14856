"""The learning rate over time, and the optimiser with its state as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from relief_onnx.training import Training

__all__ = ["factor", "load_state", "make_optimizer", "state_arrays"]


def factor(training: Training, progress: float) -> float:
    """What the learning rate is multiplied by. progress: epochs done, with fractions."""
    if progress < training.warmup:
        return progress / training.warmup
    if training.schedule == "step":
        return float(0.1 ** sum(progress >= share * training.epochs for share in training.milestones))
    if training.schedule == "cosine":
        length = max(training.epochs - training.warmup, 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * min((progress - training.warmup) / length, 1.0)))
    return 1.0


def make_optimizer(training: Training, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum, both with the weight decay as part of the gradient."""
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.rate, weight_decay=training.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=training.rate, momentum=training.momentum, weight_decay=training.weight_decay)


def state_arrays(optimizer: torch.optim.Optimizer) -> dict[str, NDArray[Any]]:
    """The optimiser's state."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}/{key}": value.detach().cpu().numpy()
        for number, values in state.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def load_state(optimizer: torch.optim.Optimizer, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Bring it back."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in arrays.items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = torch.from_numpy(value.copy())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
