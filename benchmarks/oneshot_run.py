"""One pruning run of ours in a process of its own, so that it has a time limit and its peak memory is its own.

    python -m benchmarks.oneshot_run MODEL DATA OUT OPTIONS

OPTIONS are the keywords of `relief_onnx.prune` as JSON. Writes the pruned model to OUT and prints one line `ROW {json}`: the share of
prunable weights that stayed, the report's seconds by stage, seconds of the whole call, peak memory. `run` starts it and judges nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import relief_onnx
from benchmarks.score import peak_kb
from benchmarks.zoo_models import ROOT
from relief_onnx.masks import initializer_masks
from relief_onnx.prepared import prepare

Row = dict[str, Any]


def run(model: Path, data: Path, target: Path, options: Mapping[str, Any], limit: int) -> Row:
    """kept, seconds, timing, peak_mb and start_mb (before the call); or `reason`, where it failed or took longer than `limit` seconds."""
    threads = str(options.get("threads", 1))
    command = [sys.executable, "-m", "benchmarks.oneshot_run", str(model), str(data), str(target), json.dumps(dict(options))]
    alone = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, env=os.environ | alone, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"longer than {limit} s"}
    found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not found:
        return {"reason": (done.stderr.strip().splitlines() or [f"the process died with {done.returncode}"])[-1][:200]}
    row: Row = json.loads(found[0])
    return row


def measure(model: str, data: str, target: str, options: dict[str, Any]) -> Row:
    """Prune, write, and say what it cost."""
    before = peak_kb()
    start = time.perf_counter()
    result = relief_onnx.prune(model, data, **options)
    seconds, peak = time.perf_counter() - start, peak_kb()
    onnx.save(result.model, target)
    return {
        "kept": kept(Path(model), result, repaired=options.get("repair", "none") != "none"),
        "seconds": round(seconds, 2),
        "timing": {stage: round(value, 3) for stage, value in result.report["timing"].items()},
        "peak_mb": round(peak / 1e3),
        "start_mb": round(before / 1e3),
    }


def kept(path: Path, result: relief_onnx.Result, repaired: bool) -> float:
    """The share of prunable weights that the masks leave: of those not zero before or, repaired, of all: any may be filled."""
    ready = prepare(path)
    flags = initializer_masks(ready.plan, result.masks)
    left = every = 0
    for name in ready.plan.by_weight():
        weight = ready.graph.array(name)
        left += int(np.count_nonzero(np.broadcast_to(flags.get(name, np.True_), weight.shape) & (repaired | (weight != 0))))
        every += weight.size
    return left / every


if __name__ == "__main__":
    print("ROW " + json.dumps(measure(*sys.argv[1:4], json.loads(sys.argv[4]))))
