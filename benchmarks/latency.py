"""make bench-latency: how much faster whole channels make a model at half its multiply-accumulates. Prints tables, writes JSON.

Original and pruned model run in turn in one process, in an order that changes every round; a speed-up is the median of the ratios of
the rounds. Several blocks of rounds with fresh sessions, because a session keeps the memory layout that it happened to get.
Nothing is trained or repaired: only the speed counts here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from PIL import Image

import relief_onnx
from relief_onnx.scoring import write_scores

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).parent / "results"
TARGET, TOLERANCE = 0.5, 0.03
AIM = 1.4
THREADS = (1, 2)
ROUNDS, BLOCKS = 14, 3
SAMPLE_SECONDS = 0.02  # the least that one timing takes; fast models run several times in it

Feed = dict[str, np.ndarray]
Random = dict[str, Callable[[np.random.Generator, int], np.ndarray]]  # by input: (rng, batch) -> values


@dataclass(frozen=True)
class Case:
    """A model with what it eats; `calibration` feeds for pruning, `feed` makes one batch for timing."""

    name: str
    path: Path
    calibration: list[Feed]
    feed: Callable[[int], Feed]
    batches: tuple[int, ...] = (1,)
    rounding: tuple[int, ...] = (8,)


# -- the models that are built here ----------------------------------------------------------------------------------------


class Builder:
    """Nodes and weights in the making; every method returns a tensor's name."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def op(self, operator: str, name: str, *inputs: str, **values: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **values))
        return name

    def conv(self, x: str, name: str, sizes: tuple[int, int, int], stride: int = 1, group: int = 1, bias: bool = True) -> str:
        inputs, outputs, kernel = sizes
        fan = inputs // group * kernel * kernel
        weight = self.rng.standard_normal((outputs, inputs // group, kernel, kernel)) * np.sqrt(2 / fan)
        names = [x, self.constant(f"{name}.weight", weight)]
        if bias:
            names.append(self.constant(f"{name}.bias", self.rng.standard_normal(outputs) * 0.1))
        return self.op("Conv", name, *names, strides=[stride] * 2, pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2, group=group)

    def norm(self, x: str, width: int) -> str:
        values = {"scale": self.rng.uniform(0.8, 1.2, width), "shift": self.rng.standard_normal(width) * 0.1}
        values |= {"mean": self.rng.standard_normal(width) * 0.1, "var": self.rng.uniform(0.8, 1.2, width)}
        return self.op("BatchNormalization", f"{x}.bn", x, *(self.constant(f"{x}.bn.{key}", value) for key, value in values.items()))

    def save(self, path: Path, image: tuple[int, ...], output: str, shape: tuple[int, ...]) -> None:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("input", 1, ["batch", *image])],
            [helper.make_tensor_value_info(output, 1, ["batch", *shape])],
            self.initializers,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def mobilenet(path: Path, size: int = 224) -> None:
    """MobileNetV2, width 1.0, 1000 classes, BatchNormalization and Clip left in the graph; random weights."""
    net = Builder()
    net.constant("zero", 0.0)
    net.constant("six", 6.0)

    def layer(x: str, name: str, sizes: tuple[int, int, int], stride: int = 1, group: int = 1, clip: bool = True) -> str:
        x = net.norm(net.conv(x, name, sizes, stride, group, bias=False), sizes[1])
        return net.op("Clip", f"{name}.clip", x, "zero", "six") if clip else x

    x, width = layer("input", "stem", (3, 32, 3), 2), 32
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for stage, (factor, outputs, count, first) in enumerate(rows):
        for block in range(count):
            name, inner, stride = f"stage{stage}.{block}", width * factor, first if block == 0 else 1
            y = layer(x, f"{name}.expand", (width, inner, 1)) if factor > 1 else x
            y = layer(y, f"{name}.depthwise", (inner, inner, 3), stride, inner)
            y = layer(y, f"{name}.project", (inner, outputs, 1), clip=False)
            x = net.op("Add", f"{name}.add", x, y) if stride == 1 and width == outputs else y
            width = outputs
    x = net.op("GlobalAveragePool", "mean", layer(x, "head", (width, 1280, 1)))
    weight = net.constant("fc.weight", net.rng.standard_normal((1000, 1280)) * 0.03)
    net.op("Gemm", "logits", net.op("Flatten", "flat", x), weight, net.constant("fc.bias", np.zeros(1000)), transB=1)
    net.save(path, (3, size, size), "logits", (1000,))


def unet(path: Path, base: int = 32, size: int = 256, depth: int = 4) -> None:
    """U-Net: two 3x3 convolutions per level, max pooling down, transposed convolutions up, Concat; random weights."""
    net = Builder()

    def double(x: str, name: str, inputs: int, outputs: int) -> str:
        x = net.op("Relu", f"{name}.relu1", net.conv(x, f"{name}.conv1", (inputs, outputs, 3)))
        return net.op("Relu", f"{name}.relu2", net.conv(x, f"{name}.conv2", (outputs, outputs, 3)))

    x, width, skips = "input", 3, []
    for level in range(depth):
        x, width = double(x, f"down{level}", width, base << level), base << level
        skips.append(x)
        x = net.op("MaxPool", f"pool{level}", x, kernel_shape=[2, 2], strides=[2, 2])
    x, width = double(x, "middle", width, width * 2), width * 2
    for level in reversed(range(depth)):
        half = width // 2
        weight = net.constant(f"up{level}.weight", net.rng.standard_normal((width, half, 2, 2)) * np.sqrt(1 / width))
        bias = net.constant(f"up{level}.bias", np.zeros(half))
        x = net.op("ConvTranspose", f"up{level}", x, weight, bias, strides=[2, 2], kernel_shape=[2, 2])
        x, width = double(net.op("Concat", f"cat{level}", skips[level], x, axis=1), f"merge{level}", width, half), half
    net.save(path, (3, size, size), net.conv(x, "mask", (width, 2, 1)), (2, size, size))


# -- the models and their data ---------------------------------------------------------------------------------------------


def random_case(name: str, path: Path, inputs: Random, samples: int, **more: Any) -> Case:
    """A case with random inputs."""
    rng = np.random.default_rng(1)

    def feed(batch: int) -> Feed:
        return {key: make(rng, batch).astype(np.float32) for key, make in inputs.items()}

    return Case(name, path, [feed(1) for _ in range(samples)], feed, **more)


def image(channels: int, size: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, batch: rng.standard_normal((batch, channels, size, size))


def level(rng: np.random.Generator, batch: int) -> np.ndarray:
    return rng.uniform(0.2, 0.8, batch)


def cifar(name: str, path: Path, sheet: Path, **more: Any) -> Case:
    """A case on CIFAR-10 images."""
    pixels = np.array(Image.open(sheet)).reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)[:512]
    values = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    images = np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)
    return Case(name, path, [{"input": images[at : at + 32]} for at in range(0, 256, 32)], lambda batch: {"input": images[-batch:]}, **more)


def cases(folder: Path, models: Path) -> Iterator[Case]:
    """Every case that can be made; says why the others cannot."""
    sheet = SHARED / "data" / "cifar10" / "train_00.webp"
    wanted: list[tuple[str, Path, Callable[[str, Path], Case]]] = []
    resnet = models / "resnet20_cifar10_folded.onnx"
    if sheet.exists():
        wanted.append(("ResNet-20, 32x32", resnet, partial(cifar, sheet=sheet, batches=(1, 8), rounding=(8, 1, 4, 16))))
    else:
        print("ResNet-20: skipped, the CIFAR-10 images are not there")
    mobilenet(folder / "mobilenet.onnx")
    unet(folder / "unet.onnx")
    shapes = {"noisy": image(1, 128), "sigma": level, "difficulty": level}
    random: list[tuple[str, Path, Random, int, dict[str, Any]]] = [
        ("MobileNetV2, 224x224", folder / "mobilenet.onnx", {"input": image(3, 224)}, 4, {"rounding": (8, 1, 16)}),
        ("U-Net, 256x256", folder / "unet.onnx", {"input": image(3, 256)}, 2, {"rounding": (8, 16)}),
        ("nudenet_320n (YOLOv8n)", models / "nudenet_320n.onnx", {"images": image(3, 320)}, 2, {}),
        ("ppocrv4_det, 320x320", models / "ppocrv4_det.onnx", {"x": image(3, 320)}, 2, {}),
        ("terrain_unet, 128x128", models / "terrain_unet.onnx", shapes, 1, {}),
    ]
    for name, path, inputs, samples, more in random:
        wanted.append((name, path, partial(random_case, inputs=inputs, samples=samples, **more)))
    for name, path, make in wanted:
        if path.exists():
            yield make(name, path)
        else:
            print(f"{name}: skipped, {path.name} is not there")


# -- half the work ---------------------------------------------------------------------------------------------------------


def bisect(share: Callable[[float], float], target: float = TARGET, tolerance: float = TOLERANCE, steps: int = 9) -> float:
    """The alpha whose share comes closest to `target`; stops within a third of the tolerance. `share` must not fall as alpha grows."""
    low, high, found = 0.0, 1.0, []
    for _ in range(steps):
        alpha = (low + high) / 2
        distance = share(alpha) - target
        found.append((abs(distance), alpha))
        if abs(distance) <= tolerance / 3:
            break
        low, high = (alpha, high) if distance < 0 else (low, alpha)
    return min(found)[1]


def halve(path: Path, calibration: list[Feed], round_to: int = 8, target: float = TARGET) -> tuple[float, relief_onnx.Result]:
    """Prune channels to about `target` of the MACs: (alpha, result). Scores are measured once."""
    results: dict[float, relief_onnx.Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.npz"
        write_scores(relief_onnx.score(path, calibration, criterion="relief", granularity="channel"), scores)

        def share(alpha: float) -> float:
            results[alpha] = relief_onnx.prune(path, calibration, scores=scores, granularity="channel", alpha=alpha, round_to=round_to)
            report = results[alpha].report
            return report["output"]["macs"] / report["input"]["macs"]

        alpha = bisect(share, target)
    return alpha, results[alpha]


# -- timing ----------------------------------------------------------------------------------------------------------------

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds of both in every round, side by side."""

    before: list[float]
    after: list[float]

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.before, self.after, strict=True)]

    def row(self) -> dict[str, float]:
        """Medians, and the spread of the ratios."""
        ratios = self.ratios
        low, high = np.percentile(ratios, [10, 90])
        return {
            "ms_before": round(1e3 * statistics.median(self.before), 3),
            "ms_after": round(1e3 * statistics.median(self.after), 3),
            "speedup": round(statistics.median(ratios), 3),
            "p10": round(float(low), 3),
            "p90": round(float(high), 3),
        }


def interleaved(
    before: Callable[[], Any], after: Callable[[], Any], rounds: int, repeat: int = 1, clock: Clock = time.perf_counter
) -> Timing:
    """Time both in every round, each `repeat` times in a row; which one goes first changes from round to round."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            run = (before, after)[which]
            start = clock()
            for _ in range(repeat):
                run()
            times[which].append((clock() - start) / repeat)
    return Timing(*times)


def session(model: onnx.ModelProto, threads: int, **settings: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads of the model whose turn is over must not spin on the cores of the other one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in settings.items():
        setattr(options, key, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare(before: onnx.ModelProto, after: onnx.ModelProto, feed: Feed, threads: int) -> dict[str, Any]:
    """One row of timings: all rounds of all blocks together, and the median of every block by itself."""
    blocks = []
    for _ in range(BLOCKS):
        runs = [partial(session(model, threads).run, None, feed) for model in (before, after)]
        warm = interleaved(*runs, rounds=3)
        repeat = max(1, round(SAMPLE_SECONDS / min(warm.before)))
        blocks.append(interleaved(*runs, rounds=ROUNDS, repeat=repeat))
    whole = Timing([x for block in blocks for x in block.before], [x for block in blocks for x in block.after])
    return whole.row() | {"blocks": [block.row()["speedup"] for block in blocks]}


# -- what onnxruntime makes of a model -------------------------------------------------------------------------------------


def optimised(model: onnx.ModelProto) -> Counter[str]:
    """Operators that onnxruntime runs, after its own rewriting for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        onnxruntime.set_default_logger_severity(4)
        session(model, 1, optimized_model_filepath=str(path), log_severity_level=4)
        return Counter(node.op_type for node in onnx.load(path).graph.node)


def profile(model: onnx.ModelProto, feed: Feed, runs: int = 10) -> dict[str, float]:
    """Milliseconds per run of every kind of operator, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        running = session(model, 1, enable_profiling=True, profile_file_prefix=str(Path(folder) / "profile"))
        for _ in range(runs):
            running.run(None, feed)
        events = json.loads(Path(running.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            times[event["args"]["op_name"]].append(event["dur"])
    return {name: round(sum(values) / runs / 1e3, 3) for name, values in sorted(times.items(), key=lambda item: -sum(item[1]))}


def widths(model: onnx.ModelProto) -> dict[str, int]:
    """How many convolutions write a number of channels that is a multiple of 16, of 8, of 4, or of none of them."""
    shapes = {item.name: item.dims for item in model.graph.initializer}
    found = Counter()
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in shapes:
            found[next((str(step) for step in (16, 8, 4) if shapes[node.input[1]][0] % step == 0), "other")] += 1
    return dict(found)


# -- tables ----------------------------------------------------------------------------------------------------------------


def measure(case: Case, round_to: int) -> list[dict[str, Any]]:
    """A row per batch size."""
    original = onnx.load(str(case.path))
    alpha, result = halve(case.path, case.calibration, round_to)
    before, after = result.report["input"], result.report["output"]
    nodes = (optimised(original), optimised(result.model))
    head = {
        "model": case.name, "round_to": round_to, "alpha": round(alpha, 4),
        "macs_before": before["macs"], "macs_after": after["macs"], "macs_percent": round(100 * after["macs"] / before["macs"], 1),
        "params_before": before["params"], "params_after": after["params"],
    }  # fmt: skip
    tail = {
        "nodes": [nodes[0].total(), nodes[1].total()],
        "nodes_differ": {key: [nodes[0][key], nodes[1][key]] for key in sorted(nodes[0] | nodes[1]) if nodes[0][key] != nodes[1][key]},
        "conv_widths": [widths(original), widths(result.model)],
    }
    rows = []
    for batch in case.batches if round_to == 8 else case.batches[:1]:
        feed = case.feed(batch)
        timings = {f"threads_{threads}": compare(original, result.model, feed, threads) for threads in THREADS}
        profiles = {"profile_ms": [profile(original, feed), profile(result.model, feed)]}
        rows.append(head | {"batch": batch} | timings | tail | profiles)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> None:
    """Print the rows that people read."""
    found = []
    for row in rows:
        line = {key: row[key] for key in ("model", "batch", "round_to", "alpha")}
        line |= {"MMACs": f"{row['macs_before'] / 1e6:.1f} -> {row['macs_after'] / 1e6:.1f} ({row['macs_percent']} %)"}
        line |= {"Mparams": f"{row['params_before'] / 1e6:.2f} -> {row['params_after'] / 1e6:.2f}"}
        for threads in THREADS:
            item = row[f"threads_{threads}"]
            line[f"ms, {threads} threads"] = f"{item['ms_before']:.2f} -> {item['ms_after']:.2f}"
            line[f"speed-up, {threads} (p10-p90)"] = f"{item['speedup']:.2f} ({item['p10']:.2f}-{item['p90']:.2f})"
        found.append(line)
    lengths = {key: max(len(key), *(len(str(line[key])) for line in found)) for key in found[0]}
    for cells in (dict(zip(lengths, lengths, strict=True)), *found):
        print("  ".join(str(cells[key]).ljust(length) for key, length in lengths.items()))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of channel-pruned models at about half the MACs.")
    parser.add_argument("--models", type=Path, default=SHARED / "models", help="folder of real models, filled by get.py there")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "latency.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "cores": os.cpu_count(), "rounds": ROUNDS, "blocks": BLOCKS}
    with tempfile.TemporaryDirectory() as folder:
        chosen = [case for case in cases(Path(folder), arguments.models) if arguments.only in case.name]
        control = onnx.load(str(chosen[0].path))
        noise = {f"threads_{threads}": compare(control, control, chosen[0].feed(1), threads) for threads in THREADS}
        document |= {"aim": AIM, "model_against_itself": noise, "rows": rows}
        for case in chosen:
            for round_to in case.rounding:
                start = time.perf_counter()
                rows += measure(case, round_to)
                speedups = ", ".join(f"{rows[-1][f'threads_{threads}']['speedup']:.2f} x" for threads in THREADS)
                print(f"{case.name}, --round-to {round_to}: {speedups} ({time.perf_counter() - start:.0f} s to measure)", flush=True)
                # After every model, so that a run that is stopped leaves what it measured.
                arguments.output.parent.mkdir(exist_ok=True)
                arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"\nChannels pruned to half the MACs, {BLOCKS} x {ROUNDS} interleaved rounds (aim: {AIM} x at 1 and at 2 threads)")
    table(row for row in rows if row["round_to"] == 8)
    others = {row["model"] for row in rows if row["round_to"] != 8}
    if others:
        print("The same with channels rounded up to other multiples")
        table(row for row in rows if row["batch"] == 1 and row["model"] in others)
    itself = (f"{item['speedup']} ({item['p10']}-{item['p90']}) at {key}" for key, item in noise.items())
    print(f"A model against itself: {', '.join(itself)}")


if __name__ == "__main__":
    main()
