"""python -m benchmarks.interpreter_zoo: the torch interpreter beside onnxruntime on every real model of ../shared/models.

Of each model random inputs and some samples of what it was made for: how far each output is from onnxruntime's (optimised as by
default), as it is and as a share of that output's largest value; beside it how far onnxruntime is from itself without its optimiser,
which is what rounding alone does to that model; then a backward pass from all outputs, and how many of its weights got a finite
gradient. One thread. Prints a table, and writes it as `zoo` into benchmarks/results/interpreter.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from benchmarks import zoo_samples
from benchmarks.zoo_models import RESULTS, ZOO, feed, gather, rows
from relief_onnx import prepared
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.interpreter import Network
from relief_onnx.model import input_specs, prepare
from relief_onnx.session import Session

TARGET = RESULTS / "interpreter.json"
LARGEST = 1e-4  # difference, as a share of an output's largest value, above which a row says so
NOTHING = 1e-6  # an output whose values are all smaller is judged by the difference itself


def differences(wanted: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    """The largest difference, and as a share of the largest value wanted (or of `NOTHING` / `LARGEST`, where that is larger)."""
    if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
        raise ValueError(f"{found.dtype}{found.shape} where onnxruntime has {wanted.dtype}{wanted.shape}")
    if not wanted.size:
        return 0.0, 0.0
    largest = float(np.abs(wanted.astype(np.float64) - found).max())
    return largest, largest / max(float(np.abs(wanted.astype(np.float64)).max()), NOTHING / LARGEST)


def compared(model: onnx.ModelProto, feeds: Mapping[str, list[dict[str, NDArray[Any]]]]) -> dict[str, Any]:
    """One row of the table. feeds: by what they are; the first one of each is also passed back."""
    network, session, plain = Network(model), Session(model, 1), Session(model, 1, optimize=False)
    row: dict[str, Any] = {"max_abs": 0.0, "max_rel": 0.0, "onnxruntime_max_rel": 0.0}
    network.eval()
    for own in feeds.values():
        for given in own:
            with torch.no_grad():
                outputs = network({name: torch.from_numpy(value) for name, value in given.items()})
            for a, b, c in zip(session.run(given), outputs.values(), plain.run(given), strict=True):
                found = (*differences(a, b.numpy()), differences(a, c)[1])
                row |= {key: max(row[key], value) for key, value in zip(row, found, strict=True)}
    # In training mode, where statistics of batches are statistics of the batch; every sample adds to the gradients.
    network.train()
    for own in feeds.values():
        values = network({name: torch.from_numpy(value) for name, value in own[0].items()}).values()
        real = [value.square().mean() for value in values if value.is_floating_point() and value.requires_grad]
        if real:
            sum(real, torch.zeros(())).backward()
    weights = network.weights()
    good = [name for name, weight in weights.items() if weight.grad is not None and bool(torch.isfinite(weight.grad).all())]
    missing = sorted(set(weights) - set(good))
    return row | {"feeds": {what: len(own) for what, own in feeds.items()}, "weights": len(weights), "without_gradient": missing}


def laid_open(name: str, feeds: list[dict[str, NDArray[Any]]]) -> onnx.ModelProto:
    """A model as it is while weights of the branches that these feeds take are trained."""
    ready = prepared.prepare(ZOO / f"{name}.onnx")
    return settle(ready, open_dataset(feeds, input_specs(ready.original)), samples=None, seed=0, threads=1).graph.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="", help="some of them by name, with commas")
    parser.add_argument("--samples", type=int, default=4, help="of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gather(ZOO)
    document = json.loads(TARGET.read_text())
    zoo: dict[str, Any] = document.setdefault("zoo", {})
    for row in rows():
        name, start = str(row["id"]), time.perf_counter()
        if options.models and name not in options.models.split(","):
            continue
        feeds = {"random": [feed(row, seed) for seed in range(options.samples)]}
        own, what = zoo_samples.samples(row, "calib_a", options.samples)
        feeds |= {} if what == "random" else {what: own}
        if "sr" in own[0]:  # a rate chooses between two branches; the other one, too
            feeds["other branch"] = [
                {**given, "input": given["input"][:, ::2], "sr": np.array(8000, np.int64)} for given in feeds["random"]
            ]
        zoo[name] = compared(prepare(onnx.load(ZOO / f"{name}.onnx")), feeds)
        if not zoo[name]["weights"]:  # they are in bodies: as they are trained, those of the branch that runs laid open
            zoo[name] |= {
                key: compared(laid_open(name, feeds["random"]), {"random": feeds["random"]})[key] for key in ("weights", "without_gradient")
            }
        TARGET.write_text(json.dumps(document, indent=2) + "\n")
        found = zoo[name]
        far = found["max_rel"] > max(LARGEST, found["onnxruntime_max_rel"])
        verdict = "  <--" if far or found["without_gradient"] else ""
        counts = f"{found['weights'] - len(found['without_gradient'])} of {found['weights']}"
        seconds = time.perf_counter() - start
        numbers = " ".join(f"{found[key]:9.1e}" for key in ("max_abs", "max_rel", "onnxruntime_max_rel"))
        print(f"{name:26s} {numbers} gradients {counts:11s} {seconds:6.1f} s{verdict}", flush=True)


if __name__ == "__main__":
    main()
