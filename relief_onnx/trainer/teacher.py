"""The original's outputs for any batch: from onnxruntime on the CPU, from the interpreter on a GPU; kept where they never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from relief_onnx.interpreter import Network
from relief_onnx.session import Session
from relief_onnx.trainer.samples import Draw, Samples

__all__ = ["Teacher"]

Array = NDArray[Any]

# Outputs that are kept for all samples.
KEPT_BYTES = 1 << 28


class Teacher:
    """What the student should emit."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str], samples: Samples, device: torch.device, threads: int) -> None:
        self._names, self._device = list(names), device
        self._session = Session(model, threads, "the original model") if device.type == "cpu" else None
        self._network = None if device.type == "cpu" else Network(model, trainable=()).to(device)
        self._kept: dict[str, Array] | None = None
        self._samples = samples

    def keep(self) -> None:
        """Compute the outputs of all samples now, where samples and outputs fit in memory and have a row each."""
        if not self._samples.cached or not self._samples.batchable:
            return
        kept: dict[str, Array] = {}
        for draw in self._samples.everything():
            found = self._run(draw)
            if not kept:
                if any(value.ndim < 1 or len(value) != len(draw.numbers) for value in found.values()):
                    return
                each = sum(value.nbytes for value in found.values()) / len(draw.numbers)
                if each * self._samples.total > KEPT_BYTES:
                    return
                kept = {name: np.zeros((self._samples.total, *value.shape[1:]), value.dtype) for name, value in found.items()}
            for name, value in found.items():
                if value.shape[1:] != kept[name].shape[1:]:
                    return
                kept[name][draw.numbers] = value
        self._kept = kept

    def _run(self, draw: Draw) -> dict[str, Array]:
        if self._session is not None:
            return dict(zip(self._names, self._session.run(draw.feed, self._names), strict=True))
        with torch.no_grad():
            assert self._network is not None
            found = self._network(
                {
                    name: torch.from_numpy(value if value.flags.writeable else value.copy()).to(self._device)
                    for name, value in draw.feed.items()
                }
            )
        return {name: found[name].float().cpu().numpy() for name in self._names}

    def __call__(self, draw: Draw) -> dict[str, torch.Tensor]:
        """The outputs by name."""
        found = self._run(draw) if self._kept is None else {name: value[draw.numbers] for name, value in self._kept.items()}
        return {name: torch.from_numpy(np.ascontiguousarray(value)).to(self._device) for name, value in found.items()}
