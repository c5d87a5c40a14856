"""Training under masks. One `Trainer` for a run; each round of it starts from a model and ends with new values of its initializers."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from relief_onnx import model as files
from relief_onnx.dataset import Dataset
from relief_onnx.errors import DataError, RecipeError, Unsupported
from relief_onnx.graph import Graph
from relief_onnx.interpreter import Network
from relief_onnx.trainer import checkpoint
from relief_onnx.trainer.augment import augment, check_images
from relief_onnx.trainer.heads import find_heads, label_head
from relief_onnx.trainer.loss import Objective, quality
from relief_onnx.trainer.processes import Processes
from relief_onnx.trainer.reduced import reduced, without_maps
from relief_onnx.trainer.samples import Draw, Samples
from relief_onnx.trainer.schedule import factor, load_state, make_optimizer, state_arrays
from relief_onnx.trainer.teacher import Teacher
from relief_onnx.trainer.trainable import trainable
from relief_onnx.training import Training

__all__ = ["Trained", "Trainer"]

Array = NDArray[Any]
Progress = Callable[[str, int, int | None], None]

# With fewer samples in a batch BatchNormalization keeps its running statistics. Samples that tell the variance of an output.
LEAST_BATCH, SCALE_SAMPLES = 8, 512


@dataclass(frozen=True)
class Trained:
    """What a round ends with: new values by initializer, a row per epoch, and the quality on the samples set aside (None without any).

    best_epoch: whose weights these are, 0 for those that it started from.
    """

    arrays: Mapping[str, Array]
    epochs: tuple[Mapping[str, Any], ...]
    best_epoch: int
    quality: float | None
    stopped: str


@dataclass
class _State:
    """Where a round stands: epochs done, steps and loss within this one, and the best weights on the samples set aside."""

    epoch: int = 0
    step: int = 0
    rows: int = 0
    loss: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] | None = None
    best_epoch: int = 0
    best_loss: float = math.inf
    best_quality: float | None = None


class Trainer:
    """What all rounds share: samples, the original's outputs, the loss."""

    def __init__(
        self, original: onnx.ModelProto, dataset: Dataset, training: Training, *, label_weight: float, seed: int = 0, threads: int = 0,
        progress: Progress = lambda *_: None,
    ) -> None:  # fmt: skip
        """original: the teacher, whose outputs have the student's names. Raises RecipeError, DataError."""
        self._training, self._seed, self._threads, self._progress = training, seed, threads or os.cpu_count() or 1, progress
        if training.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("this torch sees no GPU; leave out --device cuda, or install torch with CUDA")
        if label_weight > 0 and not dataset.labelled:
            ways = "--repair distill, of retrain --teacher"
            raise DataError(f"{dataset.source} has no labels to train on; add them, or train on the original's outputs: {ways}")
        check_images(dataset.inputs, training.augment)
        self.processes = Processes(training.device)
        self.samples = Samples(dataset, batch=training.batch, validation=training.validation, seed=seed)
        if not self.samples.validation_rows and (training.patience is not None or training.max_drop is not None):
            raise RecipeError(
                "patience and max-drop need samples that are set aside; give --validation, 0.1 for example, and enough samples"
            )
        original = without_maps(original)
        self.heads = find_heads(original, training.loss)
        first = next(iter(self.samples.everything()))
        floats = [head for head in self.heads if head.form != "none"]
        self.labelled = label_head(original, self.heads, first.labels) if dataset.labelled and first.labels is not None else None
        if label_weight == 0 and self.labelled is not None and first.labels is not None and first.labels.dtype.kind == "f":
            self.labelled = None
        self.judged = self.labelled or next((head for head in floats if head.kind == "kl"), floats[0])
        self.measure = "accuracy" if self.labelled is not None and first.labels is not None and first.labels.dtype.kind == "i" else (
            "top-1 agreement" if self.judged.kind == "kl" else "cosine"
        )  # fmt: skip
        self._names = [head.name for head in floats]
        self._teacher = Teacher(reduced(original, self._names), self._names, self.samples, self.processes.device, self._threads)
        self.objective = Objective(self.heads, self.labelled, label_weight, self._scales())
        if self.objective.teaches and not training.augment and training.epochs > 1:
            self._teacher.keep()

    def _scales(self) -> dict[str, float]:
        """The variance of each output of the original."""
        found: dict[str, list[torch.Tensor]] = {}
        for draw in islice(self.samples.everything(), max(SCALE_SAMPLES // self.samples.batch, 1)):
            for name, value in self._teacher(draw).items():
                found.setdefault(name, []).append(value.double().reshape(-1))
        return {name: max(float(torch.cat(values).var(correction=0)), 1e-12) for name, values in found.items()}

    def baseline(self) -> float | None:
        """The original's quality on the samples set aside: its accuracy, or 1, full agreement with itself."""
        if not self.samples.validation_rows:
            return None
        if self.measure != "accuracy":
            return 1.0
        return self._mean(self._teacher(draw) for draw in self.samples.validation())

    def _mean(self, outputs: Iterator[dict[str, torch.Tensor]]) -> float:
        total = 0.0
        for draw, found in zip(self.samples.validation(), outputs, strict=True):
            total += self._quality(draw, found, self._teacher(draw))
        return total / self.samples.validation_rows

    def _quality(self, draw: Draw, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> float:
        mine = student[self.judged.name]
        if self.measure == "accuracy" and draw.labels is not None:
            return quality(self.judged, mine[: draw.rows], torch.from_numpy(draw.labels[: draw.rows]).to(mine.device))
        theirs = teacher[self.judged.name]
        if mine.dim() and len(mine) == len(draw.numbers):
            mine, theirs = mine[: draw.rows], theirs[: draw.rows]
            return quality(self.judged, mine, theirs)
        # The samples stand along another axis, or none: all of them as one.
        axis = self.judged.axis
        return quality(replace(self.judged, axis=axis + (axis >= 0)), mine.unsqueeze(0), theirs.unsqueeze(0)) * draw.rows

    def document(self) -> dict[str, Any]:
        """What the report says about all rounds."""
        return {
            "loss": [{"output": head.name, "loss": head.kind, "form": head.form, "reason": head.reason} for head in self.heads],
            "labels": None if self.labelled is None else self.labelled.name,
            "samples": self.samples.training_rows,
            "validation_samples": self.samples.validation_rows,
            "in_memory": self.samples.cached,
            "processes": self.processes.world,
            "measure": self.measure,
        }

    def run(self, model: onnx.ModelProto, flags: Mapping[str, Array], folder: Path | None = None, inputs: str = "") -> Trained:
        """Train `model`, which has its zeros in place. flags: by initializer, what may be other than zero (broadcasts against it).

        folder: where to note how far training is, and the result. inputs: what the data is, so that notes of other data are not used.
        Raises Unsupported where torch cannot run the model, RecipeError where the loss leaves the finite.
        """
        model = reduced(without_maps(model), self._names)
        key = self._key(model, flags, inputs)
        stored = None if folder is None else checkpoint.read(folder / "trained.npz", key)
        if stored is not None:
            note, arrays = stored
            return Trained(arrays, tuple(note["epochs"]), note["best_epoch"], note["quality"], note["stopped"])
        with _settings(self._threads, self.processes.device):
            round_ = _Round(self, model, flags, None if folder is None else folder / "checkpoint.npz", key)
            found = round_.run()
            self.processes.wait()
        if folder is not None and self.processes.rank == 0:
            note = {"epochs": list(found.epochs), "best_epoch": found.best_epoch, "quality": found.quality, "stopped": found.stopped}
            checkpoint.write(folder / "trained.npz", key, note, found.arrays)
            (folder / "checkpoint.npz").unlink(missing_ok=True)
        return found

    def _key(self, model: onnx.ModelProto, flags: Mapping[str, Array], inputs: str) -> str:
        masks = [(name, files.sha256(np.packbits(flag).tobytes())) for name, flag in sorted(flags.items())]
        training = {name: value for name, value in vars(self._training).items() if name not in ("checkpoint", "iterations", "max_drop")}
        parts = (files.digest(model), masks, training, self.objective.label_weight, self._seed, self._threads,
                 self.processes.world, inputs, torch.__version__)  # fmt: skip
        return files.sha256(repr(parts).encode())


class _Round:
    """One training from start to end."""

    def __init__(self, trainer: Trainer, model: onnx.ModelProto, flags: Mapping[str, Array], path: Path | None, key: str) -> None:
        self._own, self._training, self._path, self._key, self._flags = trainer, trainer._training, path, key, flags
        self._processes, self._samples = trainer.processes, trainer.samples
        known = Network(model).weights()
        self._network = Network(model, trainable=[name for name in trainable(Graph(model)) if name in known])
        self._network.to(self._processes.device)
        weights = self._network.weights()
        self._held = [
            (weights[name], torch.from_numpy(np.broadcast_to(flag, tuple(weights[name].shape)).copy()).to(weights[name]))
            for name, flag in flags.items()
            if name in weights
        ]
        self._optimizer = make_optimizer(self._training, self._network.parameters())
        self._device = self._processes.device
        self._wrapped = self._network if self._processes.world == 1 else self._shared()
        self._state = _State()
        self._noted = time.monotonic()

    def _shared(self) -> Any:
        """The network of several processes; a first batch shows which parameters the loss needs."""
        draw = next(self._samples.epoch(0))
        teacher = self._own._teacher(draw) if self._own.objective.teaches else {}
        return self._processes.wrapped(self._network, self._loss(draw, teacher, self._network))

    def run(self) -> Trained:
        training, state = self._training, self._state
        self._resume()
        if state.epoch == state.step == 0:
            self._judge()
        stopped = ""
        while state.epoch < training.epochs and not stopped:
            self._epoch()
            self._finish_epoch()
            if training.patience is not None and self._waited() >= training.patience:
                stopped = f"no better validation loss for {training.patience} epochs"
            self._note()
        if state.best is not None:
            self._network.load_state_dict(state.best)
        return Trained(self._arrays(), tuple(state.history), state.best_epoch, state.best_quality, stopped)

    def _arrays(self) -> dict[str, Array]:
        found = self._network.arrays()
        for name, value in found.items():
            if name in self._flags:
                found[name] = np.where(self._flags[name], value, np.zeros((), value.dtype))
            if not np.isfinite(value).all():
                raise RecipeError(f"{name} left the finite numbers in training; lower --learning-rate (now {self._training.rate:g})")
        return found

    def _epoch(self) -> None:
        state, samples = self._state, self._samples
        self._wrapped.train(samples.batch >= LEAST_BATCH)
        for number, draw in enumerate(samples.epoch(state.epoch)):
            if number < state.step:
                continue
            state.loss += self._step(draw) * draw.rows
            state.rows += draw.rows
            state.step += 1
            self._own._progress("train", state.epoch * samples.training_rows + state.rows, self._training.epochs * samples.training_rows)
            if self._processes.world == 1:
                self._note()

    def _step(self, draw: Draw) -> float:
        """One step on one batch; its loss."""
        state, training = self._state, self._training
        seeds = [self._own._seed, 3, state.epoch, state.step]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        if training.augment:
            draw = Draw(augment(draw.feed, training.augment, np.random.default_rng(seeds)), draw.labels, draw.numbers, draw.rows)
        rate = training.rate * factor(training, state.epoch + (state.rows + draw.rows / 2) / self._samples.training_rows)
        draw, share = self._part(draw)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        teacher = self._own._teacher(draw) if self._own.objective.teaches else {}
        loss = self._loss(draw, teacher, self._wrapped) * share
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for weight, mask in self._held:
            if weight.grad is not None:
                weight.grad.mul_(mask)
        if training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), training.clip)
        self._optimizer.step()
        with torch.no_grad():
            for weight, mask in self._held:
                weight.mul_(mask)
        value = float(loss.detach())
        if not np.isfinite(value):
            raise RecipeError(
                f"the loss is {value} in epoch {state.epoch + 1}; lower --learning-rate (now {training.rate:g}), or add --clip 1"
            )
        return value

    def _part(self, draw: Draw) -> tuple[Draw, float]:
        """What this process takes of a batch, and what its mean counts for beside those of the others."""
        rank, world, rows = self._processes.rank, self._processes.world, len(draw.numbers)
        if world == 1 or not self._samples.batchable:
            return draw, 1.0
        own = np.arange(rank, rows, world)
        taken = own if len(own) else np.array([0])
        feed = {name: value[taken] for name, value in draw.feed.items()}
        part = Draw(feed, None if draw.labels is None else draw.labels[taken], draw.numbers[taken], len(taken))
        return part, len(own) * world / rows

    def _loss(self, draw: Draw, teacher: Mapping[str, torch.Tensor], network: Any) -> torch.Tensor:
        mixed = self._training.precision == "mixed"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=mixed):
            found = self._forward(network, draw)
        labels = None if draw.labels is None else torch.from_numpy(draw.labels).to(self._device)
        result: torch.Tensor = self._own.objective(found, teacher, labels)
        return result

    def _forward(self, network: Any, draw: Draw) -> dict[str, torch.Tensor]:
        feed = {name: _tensor(value).to(self._device) for name, value in draw.feed.items()}
        try:
            found: dict[str, torch.Tensor] = network(feed)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            where = getattr(error, "__notes__", ["in torch"])[0]
            raise Unsupported(
                f"the model does not run in torch on these samples, {where}: {str(error).splitlines()[0]}; "
                "use --repair least-squares, which needs no torch"
            ) from error
        return found

    def _validate(self) -> tuple[float | None, float | None]:
        """Loss and quality on the samples set aside."""
        samples = self._samples
        if not samples.validation_rows:
            return None, None
        self._network.train(False)
        loss = good = 0.0
        with torch.no_grad():
            for draw in samples.validation():
                teacher = self._own._teacher(draw)
                found = self._forward(self._network, draw)
                labels = None if draw.labels is None else torch.from_numpy(draw.labels).to(self._device)
                loss += float(self._own.objective(found, teacher, labels)) * draw.rows
                good += self._own._quality(draw, found, teacher)
        return loss / samples.validation_rows, good / samples.validation_rows

    def _judge(self) -> tuple[float | None, float | None]:
        """Loss and quality on the samples set aside; the best weights there are kept. Without such samples the last are the best."""
        state = self._state
        loss, good = self._validate()
        if loss is None:
            state.best_epoch = state.epoch
        elif loss < state.best_loss:
            state.best_loss, state.best_quality, state.best_epoch = loss, good, state.epoch
            state.best = {name: value.detach().clone() for name, value in self._network.state_dict().items()}
        return loss, good

    def _waited(self) -> int:
        """Epochs since the one with the least validation loss."""
        losses = [row["validation_loss"] for row in self._state.history]
        return len(losses) - 1 - losses.index(min(losses))

    def _finish_epoch(self) -> None:
        state = self._state
        rate = float(self._optimizer.param_groups[0]["lr"])
        state.epoch += 1
        loss, good = self._judge()
        row = {
            "epoch": state.epoch,
            "loss": self._processes.mean(state.loss / max(state.rows, 1)),
            "validation_loss": loss,
            "validation_quality": good,
        }
        state.history.append({**row, "learning_rate": rate})
        state.step = state.rows = 0
        state.loss = 0.0

    def _note(self) -> None:
        """Write down where training stands, if the last note is old enough."""
        if self._path is None or self._processes.rank > 0 or time.monotonic() - self._noted < self._training.checkpoint:
            return
        state = self._state
        arrays = {f"weight/{name}": value.cpu().numpy() for name, value in self._network.state_dict().items()}
        arrays |= {f"optimizer/{name}": value for name, value in state_arrays(self._optimizer).items()}
        arrays |= {f"best/{name}": value.cpu().numpy() for name, value in (state.best or {}).items()}
        note = {name: value for name, value in vars(state).items() if name != "best"}
        checkpoint.write(self._path, self._key, note, arrays)
        self._noted = time.monotonic()

    def _resume(self) -> None:
        """Take up what a stopped run has noted."""
        self._processes.wait()
        stored = None if self._path is None else checkpoint.read(self._path, self._key)
        self._processes.wait()
        if stored is None:
            return
        note, arrays = stored
        parts: dict[str, dict[str, Array]] = {"weight": {}, "optimizer": {}, "best": {}}
        for name, value in arrays.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value
        self._network.load_state_dict(_tensors(parts["weight"]))
        load_state(self._optimizer, parts["optimizer"])
        for name, value in note.items():
            setattr(self._state, name, value)
        self._state.best = {name: value.to(self._device) for name, value in _tensors(parts["best"]).items()} or None


def _tensor(array: Array) -> torch.Tensor:
    """Torch warns about memory that it may not write to, such as a mapped file."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}


@contextmanager
def _settings(threads: int, device: torch.device) -> Iterator[None]:
    """While training torch takes that many threads, and on the CPU sums in a fixed order; after it everything is as it was."""
    before = torch.get_num_threads(), torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_rng_state(before[1])
        torch.use_deterministic_algorithms(before[2])
        torch.utils.deterministic.fill_uninitialized_memory = fills
