"""`make bench-large`: a model of more than 2 GB through the command line: time, peak memory, and whether onnxruntime runs the result.

Peak memory is sampled from /proc (Linux): `anonymous` is what cannot be dropped, `mapped` are pages of files, which the system can.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "large.json"
WIDTH, LAYERS = 8192, 9  # 256 MiB each
SAMPLES = 32

RUNS: dict[str, list[str]] = {
    "score, magnitude": ["score", "--criterion", "magnitude"],
    "magnitude, one layer": ["prune", "--criterion", "magnitude", "--keep", "50%", "--storage", "dense", "--only", "fc0"],
    "magnitude": ["prune", "--criterion", "magnitude", "--keep", "50%", "--storage", "dense"],
    "relief": ["prune", "--criterion", "relief", "--keep", "50%", "--storage", "dense"],
    "flow": ["prune", "--criterion", "flow", "--keep", "50%", "--storage", "dense"],
    "flow, channels": ["prune", "--criterion", "flow", "--granularity", "channel", "--alpha-channel", "0.999", "--storage", "dense"],
    "flow, repaired": ["prune", "--criterion", "flow", "--keep", "50%", "--storage", "dense", "--repair", "least-squares"],
    "magnitude, packed": ["prune", "--criterion", "magnitude", "--keep", "10%"],
    "int8 weights": ["quantize", "--activations", "none"],
}


def build(folder: Path, layers: int, width: int) -> Path:
    """MatMul and Relu in turns, random weights in one data file, written tensor by tensor."""
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    with (folder / "weights.bin").open("wb") as file:
        for number in range(layers):
            weight = rng.standard_normal((width, width), np.float32) * np.float32((2 / width) ** 0.5)
            item = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=weight.shape)
            item.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", file.tell()), ("length", weight.nbytes)):
                item.external_data.add(key=key, value=str(value))
            file.write(weight.data)
            tensors.append(item)
            nodes += [
                helper.make_node("MatMul", [name, item.name], [f"m{number}"], name=f"fc{number}"),
                helper.make_node("Relu", [f"m{number}"], [f"r{number}"], name=f"relu{number}"),
            ]
            name = f"r{number}"
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", width]) for end in ("x", name)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    path = folder / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    np.save(folder / "x.npy", rng.standard_normal((SAMPLES, width), np.float32))
    return path


def measured(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command: seconds, exit code, peak memory in bytes."""
    peak = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for line in lines:
            key, _, value = line.partition(":")
            if key in peak:
                peak[key] = max(peak[key], 1024 * int(value.split()[0]))
        time.sleep(0.05)
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1), "exit": process.returncode, "anonymous": peak["RssAnon"], "mapped": peak["RssFile"],
        "resident": peak["VmRSS"], "error": (errors.strip().splitlines() or ["killed"])[-1] if process.returncode else "",
    }  # fmt: skip


def runs(path: Path) -> bool:
    """Whether onnxruntime runs the file by itself, with finite outputs."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.load(path.parent / "x.npy")[:2]
    return bool(np.isfinite(session.run(None, {"x": x})[0]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="; ".join(RUNS), help="with semicolons, of " + "; ".join(RUNS))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--folder", type=Path, default=None, help="where some 15 GB fit (default: the temporary folder)")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows: dict[str, Any] = json.loads(given.json.read_text())["runs"] if given.json.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="relief-onnx-large.", dir=given.folder))
    try:
        source = build(folder, given.layers, given.width)
        size = sum(file.stat().st_size for file in (source, folder / "weights.bin"))
        print(f"{size / 1e9:.2f} GB, {given.layers} layers of {given.width} x {given.width}")
        for name in [item.strip() for item in given.runs.split(";")]:
            command, *options = RUNS[name]
            out = folder / ("out.npz" if command == "score" else "out.onnx")
            row = measured(
                [sys.executable, "-m", "relief_onnx_cli", command, str(source), "--data", "x.npy", "-o", str(out), "--threads",
                 os.environ.get("OMP_NUM_THREADS", "1"), *options],
                folder,
            )  # fmt: skip
            made = [file for file in folder.iterdir() if file.name.startswith("out.")]
            row |= {"files": {file.name: file.stat().st_size for file in made}}
            row["runs"] = runs(out) if command != "score" and not row["exit"] else None
            for file in made:
                file.unlink()
            rows[name] = row
            memory = ", ".join(f"{key} {row[key] / 1e9:.1f} GB" for key in ("anonymous", "mapped", "resident"))
            print(f"{name}: exit {row['exit']} {row['error']}, {row['seconds']} s, {memory}, runs: {row['runs']}", flush=True)
            given.json.write_text(json.dumps({"bytes": size, "layers": given.layers, "width": given.width, "runs": rows}, indent=2) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
