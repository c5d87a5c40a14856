"""`make bench-paper`: LeNet-300-100 and LeNet-5 on MNIST, pruned and trained in rounds as in arXiv 2109.10795, the schedule shortened.

Per network and seed: initial weights, a dense training on labels, then each way to prune from there. Test error is that of the last epoch
of each round; the test images decide nothing. What is done already is read from build/paper, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import relief_onnx
from benchmarks.flow_models import DATA, mnist
from benchmarks.zoo_models import ROOT
from relief_onnx import model as files
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.session import Session
from relief_onnx.surgery import apply_weights, operate

__all__ = ["Plan", "main", "rounds_of"]

CACHE, RESULTS = ROOT / "build" / "paper", ROOT / "benchmarks" / "results" / "paper.json"
# Aims: share of weights kept in percent, test error in percent. Sparse VD: 1.47 at 1.92, 0.36 at 0.75.
AIMS: Mapping[str, tuple[float, float]] = {"lenet300": (1.5, 2.0), "lenet5": (0.65, 1.0)}
# Ways to prune: criterion ("paper" is the paper's rule with its alphas and its rewinding; the others meet a budget) and repair.
WAYS: Mapping[str, tuple[str, str]] = {
    "paper": ("paper", "labels"),
    "flow": ("flow", "distill"),
    "flow-obs": ("flow-obs", "distill"),
    "relief": ("relief", "distill"),
    "magnitude": ("magnitude", "distill"),
    "flow-labels": ("flow", "labels"),
    "relief-labels": ("relief", "labels"),
    "magnitude-labels": ("magnitude", "labels"),
}
CALIBRATION = 1000


@dataclass(frozen=True)
class Plan:
    """How long everything is trained. iterations: rounds. images: of the 60,000. keep: percent of the weights, None for the aim's."""

    epochs: int = 10
    dense_epochs: int = 20
    iterations: int = 10
    images: int = 60_000
    keep: float | None = None
    rewind: bool = False

    def training(self) -> dict[str, Any]:
        """As in the paper, but for the number of epochs: Adam, x 0.1 at half of them."""
        return {
            "batch": 120, "learning_rate": 1e-3, "weight_decay": 5e-4, "schedule": "step", "milestones": (0.5,), "validation": 0.0,
            "samples": CALIBRATION, "threads": 1,
        }  # fmt: skip


def _network(name: str) -> Any:
    """LeNet-300-100, or LeNet-5 as Caffe has it (20 and 50 filters, 500 units; 430,500 weights), which the published shares refer to."""
    from sample_models import build

    if name == "lenet300":
        return build.lenet300()
    net = build.Network("lenet5", "LeNet-5 of Caffe: convolutions 5x5 with 20 and 50 filters, then 800-500-10")
    x = "image"
    for index, filters in ((0, 20), (3, 50)):
        x = net.relu(net.conv(x, f"features.{index}", filters, kernel=5), f"features.{index + 1}")
        x = net.max_pool(x, f"features.{index + 2}")
    build.add_classifier(net, net.flatten(x, "flatten"), (500, 10))
    return net.finish()


def _training_data(images: int) -> Path:
    """The training images as .npy files, written once."""
    folder = CACHE / f"train-{images}"
    if not (folder / "label.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pixels, labels = mnist("train")
        np.save(folder / "image.npy", pixels[:images, None].astype(np.float32) / np.float32(255))
        np.save(folder / "label.npy", labels[:images])
    return folder


def test_error(model: onnx.ModelProto) -> float:
    """Percent of the 10,000 test images that get another class than their label."""
    pixels, labels = mnist("t10k")
    session = Session(model, 1)
    wrong = 0
    for start in range(0, len(labels), 500):
        part = pixels[start : start + 500, None].astype(np.float32) / np.float32(255)
        wrong += int((session.run({"image": part})[0].argmax(1) != labels[start : start + 500]).sum())
    return 100.0 * wrong / len(labels)


def _prepared(name: str, seed: int, plan: Plan) -> tuple[Path, Path]:
    """Files with the initial weights and with the dense network."""
    from sample_models import build

    folder = CACHE / f"{name}-{seed}-{plan.dense_epochs}-{plan.images}"
    start, dense = folder / "init.onnx", folder / "dense.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    if not start.exists():
        net = _network(name)
        files.save(build.to_onnx(net, build.initial_weights(net, np.random.RandomState(seed)), {}), start)
    if not dense.exists():
        relief_onnx.retrain(
            start, _training_data(plan.images), output=dense, epochs=plan.dense_epochs, seed=seed, storage="dense", **plan.training()
        )  # fmt: skip
    return start, dense


def _kept(model: onnx.ModelProto) -> float:
    """Percent of the prunable weights that are not zero and not dead."""
    left = operate(model).surviving
    return 100.0 * sum(int(flags.sum()) for flags in left.values()) / sum(flags.size for flags in left.values())


def _by_magnitude(model: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """The smallest weights of the whole network set to zero; `share` of all of them stay."""
    graph = Graph(model)
    weights = {layer.weight: graph.array(layer.weight) for layer in find(graph).layers}
    sizes = np.sort(np.concatenate([np.abs(value).reshape(-1) for value in weights.values()]))[::-1]
    least = sizes[max(round(share * len(sizes)), 1) - 1]
    zeroed: dict[str, NDArray[Any]] = {name: np.where(np.abs(value) >= least, value, np.float32(0)) for name, value in weights.items()}
    return apply_weights(model, zeroed)


def _magnitude(
    start: Path, dense: Path, data: Path, plan: Plan, target: float, repair: str, seed: int, folder: Path
) -> list[onnx.ModelProto]:
    """Global magnitude with the same training as the others."""
    current, found = files.load(dense), []
    for number in range(1, plan.iterations + 1):
        masked = _by_magnitude(current, (target / 100.0) ** (number / plan.iterations))
        if plan.rewind:
            kept, first = Graph(masked), Graph(files.load(start))
            names = [item.name for item in masked.graph.initializer]
            weights = {layer.weight for layer in find(kept).layers}
            rewound = {name: first.array(name) * (kept.array(name) != 0 if name in weights else 1) for name in names}
            masked = apply_weights(masked, {name: value.astype(np.float32) for name, value in rewound.items()})
        teacher = dense if repair == "distill" else None
        trained = relief_onnx.retrain(
            masked, data, teacher=teacher, epochs=plan.epochs, seed=seed, storage="dense", work_dir=folder / f"round-{number}",
            **plan.training(),
        )  # fmt: skip
        current = trained.dense
        found.append(current)
    return found


def rounds_of(name: str, way: str, seed: int, plan: Plan) -> dict[str, Any]:
    """One way to prune one network: share kept and test error after each round. Read from build/paper where it was done already."""
    note = CACHE / "runs" / f"{name}-{way}-{seed}.json"
    if note.exists():
        stored: dict[str, Any] = json.loads(note.read_text())
        if stored["plan"] == json.loads(json.dumps(asdict(plan))):
            return stored
    start, dense = _prepared(name, seed, plan)
    data, target = _training_data(plan.images), plan.keep or AIMS[name][0]
    criterion, repair = WAYS[way]
    folder = CACHE / "work" / f"{name}-{way}-{seed}"
    began = time.perf_counter()
    if criterion == "magnitude":
        models = _magnitude(start, dense, data, plan, target, repair, seed, folder)
    else:
        budget: dict[str, Any] = {"criterion": criterion, "keep": f"{target}%", "granularity": "weight"}
        budget |= {"rewind": str(start)} if plan.rewind else {}
        chosen = {"preset": "paper", "rewind": str(start)} if criterion == "paper" else budget
        relief_onnx.prune(
            dense, data, repair=repair, iterations=plan.iterations, epochs=plan.epochs, seed=seed, work_dir=folder, **chosen,
            **plan.training(),
        )  # fmt: skip
        models = [files.load(folder / f"iteration-{number}" / "trained.onnx") for number in range(1, plan.iterations + 1)]
    rows = [{"kept_percent": round(_kept(model), 3), "test_error": round(test_error(model), 2)} for model in models]
    found = {
        "network": name, "way": way, "criterion": criterion, "repair": repair, "seed": seed, "plan": asdict(plan),
        "dense_error": round(test_error(files.load(dense)), 2), "rounds": rows, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    note.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(note, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _show(found: Sequence[Mapping[str, Any]]) -> str:
    """A table for each network and schedule: a row for each way, share kept and test error after each round, the mean over seeds."""
    lines = []
    kinds = {(run["network"], json.dumps(run["plan"])): (run["network"], run["plan"]) for run in found}
    for name, plan in kinds.values():
        own = [run for run in found if (run["network"], run["plan"]) == (name, plan)]
        aim = AIMS[name]
        schedule = f"{plan['iterations']} rounds of {plan['epochs']} epochs, {plan['images']:,} images"
        lines += [
            f"\n{name}, {schedule}: dense test error {np.mean([run['dense_error'] for run in own]):.2f} %; "
            f"aim {aim[0]} % kept at {aim[1]} %"
        ]
        for way in dict.fromkeys(run["way"] for run in own):
            runs = [run["rounds"] for run in own if run["way"] == way]
            cells = [
                f"{np.mean([row['kept_percent'] for row in rows]):.2f}: {np.mean([row['test_error'] for row in rows]):.2f}"
                for rows in zip(*runs, strict=False)
            ]
            lines.append(f"  {way:17} ({len(runs)} seeds)  " + "  ".join(cells))
    return "\n".join(lines)


def _with_earlier(found: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """These runs, and those in the file of other networks, ways, seeds or schedules: networks need schedules of their own."""

    def place(run: Mapping[str, Any]) -> str:
        return json.dumps([run["network"], run["way"], run["seed"], run["plan"]])

    earlier = json.loads(path.read_text())["runs"] if path.exists() else []
    new = {place(run) for run in found}
    return sorted([*(run for run in earlier if place(run) not in new), *found], key=place)


def main() -> None:
    """Run what is asked for, print the table, write the JSON."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(AIMS), choices=list(AIMS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=plan.epochs, help="in each round; the paper has 60")
    parser.add_argument("--dense-epochs", type=int, default=plan.dense_epochs)
    parser.add_argument("--iterations", type=int, default=plan.iterations, help="the paper has up to 20")
    parser.add_argument("--images", type=int, default=plan.images, help="training images")
    parser.add_argument("--keep", type=float, help="percent of the weights after the last round (default: the aim)")
    parser.add_argument("--rewind", action="store_true", help="start every round from the initial weights (the paper's rule always does)")
    parser.add_argument("--quick", action="store_true", help="a few minutes: one network, one seed, few images, two rounds of one epoch")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not (DATA / "mnist").is_dir():
        parser.exit(1, f"MNIST is missing: {DATA / 'mnist'}\n")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan = Plan(given.epochs, given.dense_epochs, given.iterations, given.images, given.keep, given.rewind)
    if given.quick:
        plan = Plan(epochs=1, dense_epochs=2, iterations=2, images=12_000, keep=10.0)
        given.networks, given.seeds, given.output = ["lenet300"], [0], CACHE / "quick.json"
    found = []
    for name in given.networks:
        for way in given.ways:
            for seed in given.seeds:
                run = rounds_of(name, way, seed, plan)
                found.append(run)
                last = run["rounds"][-1]
                print(
                    f"{name} {way} seed {seed}: {last['kept_percent']} % kept, test error {last['test_error']} %, {run['seconds']} s",
                    flush=True,
                )
    everything = _with_earlier(found, given.output)
    print(_show(everything))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(given.output, (json.dumps({"aims": AIMS, "runs": everything}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
