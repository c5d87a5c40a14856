"""make bench-interpreter: what a training step through the interpreter costs, beside the same network as a plain nn.Module.

Forward, loss, backward and an SGD step with momentum, one thread, the two networks in turn within one process, with the same weights and
batches; ratios of medians, of the clock and of the time that the processor spent on this process (which other programs disturb less).
Batch 1 shows the interpreter's own cost most. Prints a table, writes benchmarks/results/interpreter.json, with how far the losses of the
two part.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.interpreter_models import LeNet5, ResNet18, build, to_onnx
from relief_onnx.interpreter import Network

RESULTS = Path(__file__).parent / "results"
AIM = 1.3
# Network, batch, steps that count, steps before.
CASES = ((LeNet5, 64, 400, 30), (ResNet18, 8, 24, 3), (LeNet5, 1, 800, 30), (ResNet18, 1, 60, 3))


def stepper(
    network: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor], tuple[float, float, float]]:
    """A function of a batch that makes one training step: seconds by the clock and of the processor, and the loss."""
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    network.train()

    def step(x: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
        start, busy = time.perf_counter(), time.process_time()
        loss = F.cross_entropy(run(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return time.perf_counter() - start, time.process_time() - busy, loss.item()

    return step


def measure(kind: Any, batch: int, steps: int, before: int, blocks: int) -> dict[str, Any]:
    """One row of the table: median milliseconds of both, and the ratio in every block of steps."""
    plain, source = build(kind), build(kind)
    network = Network(to_onnx(source))
    (output,) = network.outputs
    runs = {"plain": stepper(plain, plain), "interpreter": stepper(network, lambda x: network({"input": x})[output])}
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.rand(batch, *kind.shape, generator=generator), torch.randint(10, (batch,), generator=generator)) for _ in range(4)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    worst, ratios = 0.0, []
    for number in range(before + steps):
        losses = {}
        for name in sorted(runs, reverse=number % 2 == 1):
            seconds, spent, losses[name] = runs[name](*batches[number % len(batches)])
            times[name].append(seconds)
            busy[name].append(spent)
        worst = max(worst, abs(losses["plain"] - losses["interpreter"]))
    counted = {name: values[before:] for name, values in times.items()}
    for block in range(blocks):
        part = slice(block * steps // blocks, (block + 1) * steps // blocks)
        ratios.append(round(statistics.median(counted["interpreter"][part]) / statistics.median(counted["plain"][part]), 3))
    medians = {name: statistics.median(values) * 1e3 for name, values in counted.items()}
    return {
        "network": kind.__name__,
        "batch": batch,
        "plain_ms": round(medians["plain"], 3),
        "interpreter_ms": round(medians["interpreter"], 3),
        "ratio": round(medians["interpreter"] / medians["plain"], 3),
        "ratio_of_processor_time": round(statistics.median(busy["interpreter"][before:]) / statistics.median(busy["plain"][before:]), 3),
        "ratio_of_blocks": ratios,
        "largest_difference_of_losses": worst,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, batch, steps, before in CASES:
        count = max(steps // 10, options.blocks) if options.quick else steps
        rows.append(measure(kind, batch, count, before, options.blocks))
    heading = f"{'network':10s} {'batch':>5s} {'plain ms':>9s} {'interpreter ms':>15s} {'ratio':>6s} {'processor':>9s}"
    print(f"{heading}  ratio of blocks (aim {AIM})")
    for row in rows:
        blocks = " ".join(f"{value:.2f}" for value in row["ratio_of_blocks"])
        milliseconds = f"{row['plain_ms']:9.2f} {row['interpreter_ms']:15.2f}"
        print(f"{row['network']:10s} {row['batch']:5d} {milliseconds} {row['ratio']:6.2f} {row['ratio_of_processor_time']:9.2f}  {blocks}")
    if not options.quick:
        target = RESULTS / "interpreter.json"
        before = json.loads(target.read_text()) if target.exists() else {}
        document = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "aim": AIM, "rows": rows}
        target.write_text(json.dumps(document | {key: before[key] for key in ("zoo",) if key in before}, indent=2) + "\n")


if __name__ == "__main__":
    main()
