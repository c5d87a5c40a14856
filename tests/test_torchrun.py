"""Several processes: calibration in parts gives the same statistics, training in parts the same steps; only the first one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LENET, SAMPLES, TEST

from relief_onnx.sharding import collect, restore, unite
from relief_onnx.streaming import ChannelMaximum, InputMeans

pytest.importorskip("torch")

# Written by both: one process with RANK unset, and the first of two.
SCRIPT = """
import sys
from pathlib import Path
import relief_onnx
from relief_onnx.ranks import is_first
from relief_onnx.scoring import write_scores

lenet, resnet, data, out = sys.argv[1:]
for model, criterion, granularity in (
    (lenet, "flow", "connection"), (lenet, "relief", "connection"), (lenet, "relief-fast", "connection"), (lenet, "wanda", "weight"),
    (resnet, "flow", "weight"), (resnet, "relief", "connection"),
):
    found = relief_onnx.score(model, data, criterion=criterion, granularity=granularity, threads=1)
    if is_first():
        write_scores(found, Path(out) / f"{Path(model).stem}-{criterion}.npz")
result = relief_onnx.prune(resnet, data, preset="paper", threads=1, output=Path(out) / "paper.onnx", save_masks=Path(out) / "masks.npz")
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, each with one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_statistics_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    subprocess.run([sys.executable, script, LENET, SAMPLES / "resnet8.onnx", TEST, alone], check=True, timeout=300)
    result = torchrun(script, LENET, SAMPLES / "resnet8.onnx", TEST, together)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in together.iterdir())
    assert len(names) == 8
    for name in names:
        if name.endswith(".npz"):
            with np.load(alone / name) as one, np.load(together / name) as two:
                assert one.files == two.files
                for key in one.files:
                    np.testing.assert_allclose(one[key], two[key], rtol=1e-9, atol=1e-12, err_msg=f"{name} {key}")


def test_two_processes_prune_and_train_as_one(tmp_path: Path) -> None:
    common = [
        "prune", LENET, "--data", TEST, "--repair", "distill", "--keep", "8%", "--iterations", "2", "--epochs", "1", "--batch", "32",
        "--threads", "1", "--validation", "0.1",
    ]  # fmt: skip
    reports: list[Any] = []
    for number in (1, 2):
        out, report = tmp_path / f"{number}.onnx", tmp_path / f"{number}.json"
        tail = ["-o", out, "--json", report, "--work-dir", tmp_path / f"work{number}"]
        if number == 1:
            command = [sys.executable, "-m", "relief_onnx_cli", *map(str, [*common, *tail])]
            # With one BLAS thread, as each of the two has: sums of single precision depend on their number, and near ties on them.
            subprocess.run(command, check=True, timeout=300, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        else:
            result = torchrun("-m", "relief_onnx_cli", *common, *tail)
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("iteration 2:") == 1  # one process talks
        assert out.exists()
        reports.append(json.loads(report.read_text())["retrain"])
    one, two = reports
    assert (one["processes"], two["processes"]) == (1, 2)
    for first, second in zip(one["iterations"], two["iterations"], strict=True):
        assert first["weights_kept"] == second["weights_kept"]
        for key in ("loss", "validation_loss"):
            assert [epoch[key] for epoch in first["epochs"]] == pytest.approx([epoch[key] for epoch in second["epochs"]], rel=1e-3)


def test_totals_are_put_together() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(5, 3, size, size)).astype(np.float32) for size in (4, 4, 6)]  # images of two sizes

    def fed(statistic: Any, parts: list[Any]) -> Any:
        for part in parts:
            for job in statistic.jobs(part, 1.0):
                job()
        return statistic

    def measured(statistic: Any) -> Any:
        return statistic.maximum if isinstance(statistic, ChannelMaximum) else statistic.norms()

    for make in (lambda: InputMeans(None, signed=True), lambda: ChannelMaximum(1)):
        whole, first, second = (fed(make(), parts) for parts in (batches, batches[:1], batches[1:]))
        assert not np.allclose(measured(whole), measured(first))
        restore(first, unite([collect(first), collect(second)], getattr(first, "UNITE", np.add)))
        np.testing.assert_allclose(measured(whole), measured(first))
