"""make bench-score: what calibrating and scoring cost, and how small the files get. Prints tables, writes benchmarks/results/score.json.

Everything is measured side by side in one run: the same samples, batches and threads through the plain model and through
calibration and scoring, interleaved; ratios of medians. Peak memory is that of separate processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from relief_onnx import calibrate
from relief_onnx.data import Dataset, open_dataset
from relief_onnx.flow import DEFAULT_RULE, FlowMeasure
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan, find
from relief_onnx.model import input_specs, prepare, serialize
from relief_onnx.pack import pack, unpack
from relief_onnx.probes import instrument
from relief_onnx.scoring import measurements, normalise
from relief_onnx.session import Session

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).parent / "results"
CRITERIA = ("relief", "relief-fast", "flow")
THREADS = 2
ROUNDS = 5


def resnet18(path: Path) -> None:
    """A network of ResNet-18's size on 96x96 images, random weights: only its cost matters here."""
    rng = np.random.default_rng(0)
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def conv(x: str, sizes: tuple[int, int, int, int], name: str, add: str = "", relu: bool = True) -> str:
        inputs, outputs, kernel, stride = sizes
        weight = rng.standard_normal((outputs, inputs, kernel, kernel)) * np.sqrt(2 / (inputs * kernel * kernel))
        initializers.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
        initializers.append(numpy_helper.from_array(rng.standard_normal(outputs).astype(np.float32) * 0.1, f"{name}.bias"))
        nodes.append(
            helper.make_node("Conv", [x, f"{name}.weight", f"{name}.bias"], [name], name=name, strides=[stride] * 2, pads=[kernel // 2] * 4)
        )
        for op, extra in (("Add", [add] if add else None), ("Relu", [] if relu else None)):
            if extra is not None:
                nodes.append(helper.make_node(op, [nodes[-1].output[0], *extra], [f"{name}.{op}"], name=f"{name}.{op}"))
        return str(nodes[-1].output[0])

    x = conv("input", (3, 64, 7, 2), "stem")
    nodes.append(helper.make_node("MaxPool", [x], ["pool"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))
    x, channels = "pool", 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            name = f"layer{stage + 1}.{block}"
            y = conv(x, (channels, width, 3, stride), f"{name}.conv1")
            shortcut = x if channels == width else conv(x, (channels, width, 1, stride), f"{name}.down", relu=False)
            x, channels = conv(y, (width, width, 3, 1), f"{name}.conv2", add=shortcut), width
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    initializers.append(numpy_helper.from_array((rng.standard_normal((1000, 512)) * 0.04).astype(np.float32), "fc.weight"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight"], ["logits"], transB=1))
    graph = helper.make_graph(
        nodes,
        "resnet18",
        [helper.make_tensor_value_info("input", 1, ["batch", 3, 96, 96])],
        [helper.make_tensor_value_info("logits", 1, ["batch", 1000])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def cases(folder: Path) -> list[tuple[str, Path, int, int]]:
    """(name, model, samples, batch)."""
    resnet18(folder / "resnet18_96.onnx")
    found = [
        ("lenet5", ROOT / "sample_models" / "lenet5.onnx", 4096, 256),
        ("resnet20", SHARED / "models" / "resnet20_cifar10_folded.onnx", 1024, 32),
        ("resnet20 with BN", SHARED / "models" / "resnet20_cifar10_bn.onnx", 1024, 32),
        ("resnet18 at 96x96", folder / "resnet18_96.onnx", 512, 32),
    ]
    for name, path, *_ in found:
        if not path.exists():
            print(f"{name}: skipped, {path.name} is not there")
    return [case for case in found if case[1].exists()]


def dataset_for(model: onnx.ModelProto, samples: int, batch: int) -> Dataset:
    specs = input_specs(model)
    rng = np.random.default_rng(1)
    shape = [int(size) for size in specs[0].shape[1:] if size is not None]
    feeds = [{specs[0].name: rng.standard_normal((batch, *shape)).astype(np.float32)} for _ in range(samples // batch)]
    return open_dataset(feeds, specs)


def plain(session: Session, dataset: Dataset, batch: int) -> float:
    start = time.perf_counter()
    for item in dataset.batches(batch):
        session.run(item.feed)
    return time.perf_counter() - start


def scored(model: onnx.ModelProto, criterion: str) -> Callable[[Dataset, int], float]:
    """Calibrate and score: everything from the loaded probe to normalised scores."""
    graph = Graph(prepare(model))
    plan = find(graph)
    if criterion == "flow":
        return _scored_by_flow(graph, plan)
    probe = instrument(graph, *_tensors(graph, plan, criterion))
    session = Session(probe.model, THREADS)

    def run(dataset: Dataset, batch: int) -> float:
        start = time.perf_counter()
        wanted, layer_statistics, _ = measurements(graph, plan, criterion)
        calibrate.feed(session, probe, wanted, dataset, batch, limit=None, seed=0, threads=THREADS)
        for layer in plan.layers:
            normalise(graph, layer, layer_statistics[layer.name])
        return time.perf_counter() - start

    return run


def _scored_by_flow(graph: Graph, plan: Plan) -> Callable[[Dataset, int], float]:
    """The same for flow, with the few samples that its groups are found on and with loading the model for them."""
    probe = instrument(graph, [item.tensor for item in FlowMeasure(graph, plan, "connection").measurements])
    session = Session(probe.model, THREADS)

    def run(dataset: Dataset, batch: int) -> float:
        start = time.perf_counter()
        grouping = calibrate.sort_samples(graph.model, dataset, DEFAULT_RULE.bits, limit=None, seed=0, threads=THREADS)
        measure = FlowMeasure(graph, plan, "connection", grouping=grouping)
        calibrate.feed(session, probe, measure.measurements, dataset, batch, limit=None, seed=0, threads=THREADS, grouping=grouping)
        measure.scores({})
        return time.perf_counter() - start

    return run


def _tensors(graph: Graph, plan: Any, criterion: str) -> tuple[list[str], Any]:
    wanted, _, inside = measurements(graph, plan, criterion)
    return [item.tensor for item in wanted], inside


def speed(name: str, path: Path, samples: int, batch: int) -> dict[str, Any]:
    model = onnx.load(str(path))
    dataset = dataset_for(model, samples, batch)
    session = Session(model, THREADS)
    runs = {criterion: scored(model, criterion) for criterion in CRITERIA}
    times: dict[str, list[float]] = {key: [] for key in ("plain", *CRITERIA)}
    for _ in range(ROUNDS):
        times["plain"].append(plain(session, dataset, batch))
        for criterion, run in runs.items():
            times[criterion].append(run(dataset, batch))
    medians = {key: statistics.median(values) for key, values in times.items()}
    row: dict[str, Any] = {"model": name, "samples": samples, "batch": batch, "plain_s": round(medians["plain"], 4)}
    for criterion in CRITERIA:
        row[f"{criterion}_ratio"] = round(medians[criterion] / medians["plain"], 2)
    row["flow_over_fast"] = round(medians["flow"] / medians["relief-fast"], 2)
    peaks = {mode: peak(path, samples, batch, mode) for mode in ("plain", *CRITERIA)}
    for criterion in CRITERIA:
        row[f"{criterion}_memory_ratio"] = round(peaks[criterion] / peaks["plain"], 2)
    return row | {"plain_peak_mb": round(peaks["plain"] / 1e3)}


def peak(path: Path, samples: int, batch: int, mode: str) -> int:
    """Peak resident memory in kB of a process that does just that."""
    command = [sys.executable, "-m", "benchmarks.score", "--peak", str(path), str(samples), str(batch), mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()[-1])


def measure_peak(path: str, samples: str, batch: str, mode: str) -> None:
    model = onnx.load(path)
    dataset = dataset_for(model, min(int(samples), 4 * int(batch)), int(batch))
    if mode == "plain":
        plain(Session(model, THREADS), dataset, int(batch))
    else:
        scored(model, mode)(dataset, int(batch))
    print(peak_kb())


def peak_kb() -> int:
    """Peak resident memory of this process in kB (Linux). Not getrusage: its maximum survives exec, so a child has its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def file_sizes(name: str, path: Path) -> list[dict[str, Any]]:
    """Packed size over the entropy bound of the weight tensors plus everything else, at random connection masks."""
    model = unpack(onnx.load(str(path)))
    graph = Graph(prepare(model))
    plan = find(graph)
    rows = []
    for kept in (0.02, 0.05, 0.10, 0.30, 0.50):
        rng = np.random.default_rng(2)
        pruned, bound, dense = onnx.ModelProto(), 0.0, 0
        pruned.CopyFrom(graph.model)
        by_name = {item.name: item for item in pruned.graph.initializer}
        for layer in plan.layers:
            weight = layer.view.apply(graph.array(layer.weight)).copy()
            weight[rng.random(weight.shape[:2]) >= kept] = 0
            by_name[layer.weight].CopyFrom(numpy_helper.from_array(layer.view.invert(weight), layer.weight))
            share = max(min(np.count_nonzero(weight) / weight.size, 1 - 1e-12), 1e-12)
            entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
            bound += (np.count_nonzero(weight) * 32 + weight.size * entropy) / 8
            dense += weight.nbytes
        rest = len(serialize(graph.model)) - dense
        size = len(serialize(pack(pruned, [layer.weight for layer in plan.layers])[0]))
        rows.append({"model": name, "kept_percent": 100 * kept, "bytes": size, "of_bound": round(size / (bound + rest), 3)})
    return rows


def startup() -> dict[str, float]:
    """Seconds of `relief-onnx --help` and of importing click alone, medians."""
    executable = Path(sys.executable).parent / "relief-onnx"
    commands = {"help_s": [str(executable), "--help"], "import_click_s": [sys.executable, "-c", "import click"]}
    times: dict[str, list[float]] = {key: [] for key in commands}
    for _ in range(9):
        for key, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[key].append(time.perf_counter() - start)
    return {key: round(statistics.median(values), 3) for key, values in times.items()}


def show(rows: list[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    print()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = cases(Path(folder))
        print(f"Calibrating and scoring as a multiple of the plain model, {THREADS} threads")
        print("(aim: relief 2.0, relief-fast 1.3, flow 1.5 x relief-fast, memory 1.5)")
        speeds = [speed(*case) for case in models]
        show(speeds)
        print("File size over the entropy bound of the weights plus everything else (aim: 1.10)")
        sizes = [row for name, path in (("lenet300", ROOT / "sample_models" / "lenet300.onnx"), *((m[0], m[1]) for m in models if m[0] != "lenet5")) for row in file_sizes(name, path)]  # fmt: skip  # noqa: E501
        show(sizes)
    start = startup()
    print(f"relief-onnx --help {start['help_s']} s, python -c 'import click' {start['import_click_s']} s (aim: within 0.3 s)")
    RESULTS.mkdir(exist_ok=True)
    document = {"threads": THREADS, "rounds": ROUNDS, "speed": speeds, "files": sizes, "startup": start}
    (RESULTS / "score.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        measure_peak(*sys.argv[2:])
    else:
        main()
