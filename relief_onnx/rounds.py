"""Around each round of retraining: its budget, the weights that it starts from, its place on disk, whether it lost too much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx import model as files
from relief_onnx.control import branching, settle
from relief_onnx.dataset import Dataset
from relief_onnx.errors import RecipeError
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.layers import Plan
from relief_onnx.options import Options, Share
from relief_onnx.prepared import prepare
from relief_onnx.ranks import is_first
from relief_onnx.surgery import apply_weights
from relief_onnx.trainer import open_loop

__all__ = ["Rounds"]


class Rounds:
    """The rounds of one run, and what the report says about them."""

    def __init__(
        self, original: onnx.ModelProto, dataset: Dataset, options: Options, folder: Path | None,
        progress: Callable[[str, int, int | None], None],
    ) -> None:  # fmt: skip
        """original: the teacher. folder: where rounds are kept. Raises RecipeError (torch is not installed, options), DataError."""
        self._options, self._training = options, options.training
        self._folder = folder if dataset.fingerprint is not None else None
        self._inputs = dataset.fingerprint or ""
        self._start = _stored(self._training.rewind, dataset, options)
        self._trainer = open_loop().Trainer(
            original, dataset, self._training, label_weight=self._training.labels_count(options.repair), seed=options.seed,
            threads=options.threads, progress=progress,
        )  # fmt: skip
        self._baseline: float | None = self._trainer.baseline()
        self._rows: list[dict[str, Any]] = []
        self._stopped = ""
        self._again: list[str] = []

    def options(self, number: int) -> Options:
        """The options of round `number`, from 1: a budget is reached in equal factors."""
        options, count = self._options, self._training.iterations
        return options if options.keep is None or count == 1 else replace(options, keep=Share(options.keep ** (number / count)))

    def folder(self, number: int) -> Path | None:
        """Where round `number` keeps its scores; the first one where a run without training does."""
        if self._folder is None or number == 1:
            return self._folder
        found = self._folder / f"iteration-{number}"
        if is_first():
            found.mkdir(exist_ok=True)
        return found

    def rewound(self, graph: Graph) -> Graph:
        """The graph with the weights that every round starts from, where they are given. Raises RecipeError where they do not fit."""
        if not self._start:
            return graph
        found = {}
        for name, item in graph.initializers.items():
            if item.data_type not in FLOATS or name not in self._start:
                continue
            if self._start[name].shape != tuple(item.dims):
                raise RecipeError(
                    f"{self._training.rewind}: {name} has shape {list(self._start[name].shape)}, in the model {list(item.dims)}; "
                    "give the model's own weights from before its training"
                )
            found[name] = self._start[name].astype(graph.array(name).dtype)
        if not found:
            raise RecipeError(f"{self._training.rewind} has no weight of the model; give the same network with its initial weights")
        return Graph(apply_weights(graph.model, found))

    def train(
        self, number: int, model: onnx.ModelProto, flags: Mapping[str, NDArray[np.bool_]], again: Mapping[str, Any] | None
    ) -> Mapping[str, NDArray[Any]]:
        """Train `model` under masks; new values by initializer. again: what recalibration says about itself."""
        folder = None if self._folder is None else self._folder / f"iteration-{number}"
        found = self._trainer.run(model, flags, folder, self._inputs)
        if folder is not None and is_first():
            files.save(apply_weights(model, found.arrays), folder / "trained.onnx")
        self._again = [] if again is None else list(again["recalibrated"])
        self._rows.append({
            "iteration": number, "target_percent": None, "quality": found.quality, "drop": None, "epochs": list(found.epochs),
            "epoch_shipped": found.best_epoch, "stopped": found.stopped,
        })  # fmt: skip
        keep = self.options(number).keep
        self._rows[-1]["target_percent"] = None if keep is None else 100.0 * keep
        if found.quality is not None and self._baseline is not None:
            self._rows[-1]["drop"] = 100.0 * (self._baseline - found.quality)
        arrays: Mapping[str, NDArray[Any]] = found.arrays
        return arrays

    def count(self, plan: Plan, surviving: Mapping[str, NDArray[np.bool_]]) -> None:
        """Note what is left of all prunable weights after this round."""
        weights = sum(surviving[weight].size for weight in plan.by_weight())
        kept = sum(int(surviving[weight].sum()) for weight in plan.by_weight())
        self._rows[-1] |= {"weights": weights, "weights_kept": kept, "kept_percent": 100.0 * kept / max(weights, 1)}

    def lost_too_much(self) -> bool:
        """Whether this round has lost more than is allowed, so that the one before it ships."""
        drop, most = self._rows[-1]["drop"], self._training.max_drop
        if drop is None or most is None or drop <= most:
            return False
        self._stopped = (
            f"iteration {len(self._rows)} loses {drop:.2f} points of {self._trainer.measure}, more than the {most:g} of max-drop"
        )
        return True

    def refusal(self) -> str:
        """Why nothing is left to ship."""
        return f"{self._stopped}, so nothing is left to ship; keep more in each iteration, train longer with --epochs, or allow more"

    def document(self) -> dict[str, Any]:
        """The report's `retrain`."""
        return {
            "method": self._options.repair, "label_weight": self._training.labels_count(self._options.repair),
            **self._trainer.document(), "recalibrated": self._again, "baseline": self._baseline, "iterations": self._rows,
            "iterations_shipped": len(self._rows) - bool(self._stopped), "stopped": self._stopped,
        }  # fmt: skip


def _stored(path: str | None, dataset: Dataset, options: Options) -> dict[str, NDArray[Any]]:
    """All initializers of a model file, those in branches that run among them."""
    if path is None:
        return {}
    ready = prepare(path)
    if branching(ready.graph):
        ready = settle(ready, dataset, samples=options.samples, seed=options.seed, threads=options.threads)
    graph = ready.graph
    return {name: graph.array(name) for name, item in graph.initializers.items() if item.data_type in FLOATS}
