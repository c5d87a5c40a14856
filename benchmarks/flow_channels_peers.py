"""The other pruners of make bench-flow-channels: every one-shot criterion of Torch-Pruning and onnxsim, nothing trained or repaired.

Runs in build/peers. Each criterion is tried in every form of the file and with every scope of ranking that the tool has; the ratio is
searched so that the multiply-accumulates come to at most the target (0.6 points more where all layers get one ratio, which moves the work
in large steps: in the peers' favour). `labels` marks criteria that read labels and gradients.

Torch-Pruning works on what onnx2torch makes of the file, with the groups whose cut breaks that model left out (benchmarks/peers_torch.py
finds them: the residual streams, because of the Pad of the shortcuts). Importances are computed once per criterion by its own code, and
handed to its pruner again for each ratio; the final cut is made by a fresh pruner and its work is counted in a real run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import onnx

from benchmarks.flow_channels_data import (
    ALL,
    CACHE,
    FIRST,
    FORMS,
    INPUT,
    MODELS,
    ROUNDING,
    TARGETS,
    Cells,
    Row,
    Run,
    accuracies,
    accuracy,
    at_most,
    batches,
    best_rows,
    images,
    model_path,
    onnx_macs,
    runner,
)
from benchmarks.peers_forms import first_line
from benchmarks.peers_torch import Trial, graph_of, prune_groups, roots, shapes, stub_torchvision

SCOPES = {"local": {}, "global": {"global_pruning": True}, "isomorphic": {"global_pruning": True, "isomorphic": True}}
# With one ratio for all layers the work falls in steps of 3 points; a quarter of all channels leaves 75.3 %, half of them 50.5 %.
LOCAL_SLACK = 0.006
ONNXSIM_CALIBRATION = 250
# Hundreds of cuts: one that is this many points behind on 500 images (their standard error is about 2) is not measured on more.
SCREEN, SCREEN_MARGIN = 500, 8.0
LABELLED = ("taylor", "hessian", "obdc")


# -- Torch-Pruning ---------------------------------------------------------------------------------------------------------


def criteria() -> dict[str, Callable[[], Any]]:
    """Torch-Pruning's importances that need no training, with the reductions over a group that its documentation names."""
    import torch
    import torch_pruning as tp

    imp = tp.importance
    norms = [torch.nn.modules.batchnorm._BatchNorm]
    found: dict[str, Callable[[], Any]] = {
        "LAMP": imp.LAMPImportance,
        "LAMP first": lambda: imp.LAMPImportance(group_reduction="first"),
        "FPGM": imp.FPGMImportance,
        "FPGM first": lambda: imp.FPGMImportance(group_reduction="first"),
        "BN scale": imp.BNScaleImportance,
        "BN scale, normalizer None": lambda: imp.MagnitudeImportance(p=1, normalizer=None, target_types=norms),
        "random": imp.RandomImportance,
        "activation": imp.ActivationImportance,
        "activation, normalizer None": lambda: imp.ActivationImportance(normalizer=None),
        "taylor": imp.TaylorImportance,
        "taylor, normalizer None": lambda: imp.TaylorImportance(normalizer=None),
        "taylor multivariable": lambda: imp.TaylorImportance(multivariable=True),
        "taylor multivariable, normalizer None": lambda: imp.TaylorImportance(multivariable=True, normalizer=None),
        "hessian": imp.HessianImportance,
        "hessian, normalizer None": lambda: imp.HessianImportance(normalizer=None),
        "obdc": lambda: imp.OBDCImportance(num_classes=10),
    }
    found |= {
        f"magnitude L{p} {reduction}": lambda p=p, reduction=reduction: imp.MagnitudeImportance(p=p, group_reduction=reduction)
        for p in (1, 2)
        for reduction in ("first", "mean", "max", "prod", "gate")
    }
    found |= {
        f"magnitude L{p} mean, normalizer {normalizer}": lambda p=p, normalizer=normalizer: imp.MagnitudeImportance(
            p=p, normalizer=normalizer
        )
        for p in (1, 2)
        for normalizer in (None, "sum", "max", "gaussian")
    }
    return found


class Stored:
    """An importance whose answers are kept by the name of a group's root, so that copies of the network get the same."""

    def __init__(self, values: dict[str, Any], names: dict[Any, str]) -> None:
        self.values, self.names = values, names

    def __call__(self, group: Any) -> Any:
        found = self.values[self.names[group[0].dep.target.module]]
        return None if found is None else found.clone()


class Torch:
    """One form of a model in torch: its prunable groups, its statistics on the calibration images, and cuts of it."""

    def __init__(self, name: str, form: str) -> None:
        stub_torchvision()
        import onnx2torch
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.network = onnx2torch.convert(onnx.load(model_path(name, form))).eval()
        self.example = (torch.zeros(1, 3, 32, 32),)
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.no_grad():
            reference = shapes(self.network(*self.example))
        graph = graph_of(copy.deepcopy(self.network), self.example)
        groups = list(graph.get_all_groups(root_module_types=roots()))
        self.refused = list(prune_groups(graph, groups, Trial(self.network, self.example, reference), 1))[-1]["refused"]
        self.work = self.layer_macs(self.network)
        self.pruner = self.make_pruner(self.network, None)
        self.squares: dict[Any, Any] = {}

    def names(self, network: Any) -> dict[Any, str]:
        return {module: name for name, module in network.named_modules()}

    def layer_macs(self, network: Any) -> dict[str, int]:
        """Multiply-accumulates of every Conv and Linear for one image, from the shapes of a real run."""
        torch, found, hooks = self.torch, {}, []
        for name, module in network.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                count = lambda layer, _, out, name=name: found.__setitem__(name, out.numel() * layer.weight[0].numel())
                hooks.append(module.register_forward_hook(count))
        with torch.no_grad():
            network(*self.example)
        for hook in hooks:
            hook.remove()
        return found

    def make_pruner(self, network: Any, importance: Any, ratio: float = 0.5, **settings: Any) -> Any:
        import torch_pruning as tp

        modules = dict(network.named_modules())
        return tp.pruner.BasePruner(
            network,
            self.example,
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=[modules[name] for name in self.refused],
            root_module_types=list(roots()),
            **settings,
        )

    def gradients(self) -> None:
        """Gradients of the loss on the labelled calibration images: summed on the parameters, their squares per image beside them."""
        torch = self.torch
        values, labels = (torch.from_numpy(item) for item in images("calib"))
        names = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        total = {name: torch.zeros_like(parameter) for name, parameter in names.items()}
        squares = {name: torch.zeros_like(parameter) for name, parameter in names.items()}
        for index in range(len(values)):
            self.network.zero_grad()
            torch.nn.functional.cross_entropy(self.network(values[index : index + 1]), labels[index : index + 1]).backward()
            for name, parameter in names.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad
                    squares[name] += parameter.grad**2
        for name, parameter in names.items():
            parameter.grad = total[name] / len(values)
        self.squares = {parameter: squares[name] for name, parameter in names.items()}

    def importances(self, make: Callable[[], Any], criterion: str) -> dict[str, Any]:
        """By name of a group's root: the importance of its channels, or None where the criterion has nothing to say."""
        torch = self.torch
        importance = make()
        if criterion.startswith(LABELLED) and not self.squares:
            self.gradients()
        if criterion.startswith("activation"):
            with torch.no_grad(), importance.compute_importance(self.network):
                self.network(torch.from_numpy(images("calib")[0]))
        if criterion.startswith("hessian"):
            # Its accumulate_grad looks parameters up by name but stores them by value, so that only the last image would count.
            importance._accu_grad, importance._counter = self.squares, dict.fromkeys(self.squares, len(images("calib")[1]))
        if criterion.startswith("obdc"):
            importance._prepare_model(self.network, self.pruner)
        torch.manual_seed(0)
        names, found = self.names(self.network), {}
        for group in self.pruner.DG.get_all_groups(ignored_layers=self.pruner.ignored_layers, root_module_types=list(roots())):
            found[names[group[0].dep.target.module]] = importance(group)
        return found

    def planned(self, values: dict[str, Any], kept: float, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Which channels its pruner would remove, by name of the root, without removing them."""
        pruner = self.pruner
        pruner.importance = Stored(values, self.names(self.network))
        pruner.global_pruning = settings.get("global_pruning", False)
        pruner.isomorphic, pruner.round_to = settings.get("isomorphic", False), settings["round_to"]
        pruner.per_step_pruning_ratio = pruner.iterative_pruning_ratio_scheduler(1 - kept, 1)
        pruner.current_step, pruner._scope_initial_channels = 0, {}
        names, found = self.names(self.network), {}
        self.inner: dict[str, list[str]] = getattr(self, "inner", {})
        for group in pruner.step(interactive=True):
            root = names[group[0].dep.target.module]
            found[root] = tuple(sorted(int(index) for index in group[0].idxs))
            if root not in self.inner:
                self.inner[root] = [names[dep.target.module] for dep, _ in group if names.get(dep.target.module) in self.work]
        return found

    def share(self, plan: dict[str, tuple[int, ...]]) -> float:
        """The work that would be left: the groups inside blocks share no layer, so each takes its part off its own layers."""
        left = dict(self.work)
        modules = dict(self.network.named_modules())
        for root, gone in plan.items():
            width = modules[root].out_channels
            for layer in self.inner[root]:
                left[layer] -= self.work[layer] * len(gone) // width
        return sum(left.values()) / sum(self.work.values())

    def cut(self, values: dict[str, Any], kept: float, settings: dict[str, Any]) -> Any:
        network = copy.deepcopy(self.network)
        self.make_pruner(network, Stored(values, self.names(network)), 1 - kept, **settings).step()
        return network

    def run(self, network: Any) -> Run:
        def forward(batch: np.ndarray) -> np.ndarray:
            with self.torch.no_grad():
                return np.asarray(network(self.torch.from_numpy(batch)).numpy())

        return forward


def screened(run: Run, leader: float) -> dict[str, float]:
    """Accuracy on the first images; on fewer of them where that is already far below the best so far."""
    quick = accuracy(run, SCREEN)
    far = quick < leader - SCREEN_MARGIN
    return {"accuracy_500": quick} if far else {"accuracy_2500": accuracy(run, FIRST)}


def torch_pruning(name: str, form: str, cells: Cells, rounding: tuple[int, ...], wanted: re.Pattern[str]) -> None:
    made: list[Torch] = []
    stored: dict[str, Any] = {}
    seen: dict[str, dict[str, float]] = {}

    def source() -> Torch:
        if not made:
            made.append(Torch(name, form))
        return made[0]

    def importances(criterion: str) -> dict[str, Any]:
        if criterion not in stored:
            stored[criterion] = source().importances(criteria()[criterion], criterion)
        return stored[criterion]

    def leader(row: Row) -> float:
        """The best so far on the first images, of the same target, rounding and kind."""
        alike = [other for other in cells.rows.values() if all(other[key] == row[key] for key in ("round_to", "target", "labels"))]
        return max((other.get("accuracy_2500", 0.0) for other in alike), default=0.0)

    def measure(criterion: str, scope: str, round_to: int, target: float) -> Row:
        start = time.perf_counter()
        row: Row = {"tool": "Torch-Pruning", "criterion": criterion, "labels": criterion.startswith(LABELLED), "setting": scope}
        row |= {"form": form, "round_to": round_to, "target": target}
        settings = SCOPES[scope] | {"round_to": None if round_to == 1 else round_to}
        try:
            values, side = importances(criterion), source()
            if all(item is None for item in values.values()):
                return row | {"reason": "has nothing to rank by in this form"}
            limit = target + (LOCAL_SLACK if scope == "local" else 0.0)
            found = at_most(lambda kept: side.share(side.planned(values, kept, settings)), limit)
            if found is None:
                return row | {"reason": "cannot come down to the target"}
            network = side.cut(values, found[0], settings)
            work = sum(side.layer_macs(network).values())
            if abs(work / sum(side.work.values()) - found[1]) > 1e-6:
                raise RuntimeError(f"planned {found[1]:.4f} of the work, the cut has {work / sum(side.work.values()):.4f}")
            plan = side.planned(values, found[0], settings)
            mark = hashlib.sha256(repr(sorted(plan.items())).encode()).hexdigest()
            if mark not in seen:
                seen[mark] = screened(side.run(network), leader(row))
            row |= {"kept": found[0], "macs": work, "share": round(found[1], 4)} | seen[mark]
        except Exception as error:
            row |= {"reason": first_line(error)}
        return row | {"seconds": round(time.perf_counter() - start, 1)}

    for round_to in rounding:
        for criterion in filter(wanted.search, criteria()):
            for scope in SCOPES:
                for target in TARGETS:
                    key = ("Torch-Pruning", form, criterion, scope, round_to, target)
                    show(cells.get(key, lambda args=(criterion, scope, round_to, target): measure(*args)))
    rows = [row for row in cells.rows.values() if row["tool"] == "Torch-Pruning"]
    for row in best_rows(rows, ("round_to", "target", "labels")).values():
        if row["form"] == form and "accuracy_10000" not in row:
            settings = SCOPES[row["setting"]] | {"round_to": None if row["round_to"] == 1 else row["round_to"]}
            network = source().cut(importances(row["criterion"]), row["kept"], settings)
            row["accuracy_10000"] = accuracy(source().run(network), ALL)
            cells.save()


# -- onnxsim ---------------------------------------------------------------------------------------------------------------


Cut = Callable[[onnx.ModelProto, float], onnx.ModelProto]


def onnxsim_ways() -> Iterator[tuple[str, str, Cut, Cut]]:
    """(criterion, setting, how it cuts a model to a sparsity, a cheaper function that leaves as much work)."""
    import onnxsim

    # A calibrated cut of ResNet-56 costs six seconds with these, and the search needs many.
    feeds = [{INPUT: batch} for batch in batches(images("calib")[0][:ONNXSIM_CALIBRATION], 50)]

    def plain(model: onnx.ModelProto, gone: float, **given: Any) -> onnx.ModelProto:
        return onnxsim.apply_structured_pruning(model, gone, **given)

    def wanda(model: onnx.ModelProto, gone: float, **given: Any) -> onnx.ModelProto:
        return onnxsim.apply_structured_wanda_pruning(model, feeds, sparsity=gone, **given)

    for norm in ("l1", "l2"):
        for scope in (False, True):
            setting = "global" if scope else "local"
            given = {"importance_norm": norm, "global_sparsity": scope}
            by_weights, by_images = partial(plain, **given), partial(wanda, **given)
            yield f"structured {norm}", setting, by_weights, by_weights
            # Without a global ranking every layer loses the given share, whatever ranks its channels.
            yield f"structured Wanda {norm}", setting, by_images, by_images if scope else by_weights


def onnxsim_pruning(name: str, cells: Cells, wanted: re.Pattern[str]) -> None:
    """It has no rounding to multiples, and its simplify turns the file with BatchNormalization into the folded one."""
    model = onnx.load(model_path(name, "folded"))
    total = onnx_macs(model)

    def measure(criterion: str, setting: str, cut: Cut, cheaper: Cut, target: float) -> Row:
        start = time.perf_counter()
        row: Row = {"tool": "onnxsim", "criterion": criterion, "labels": False, "setting": setting}
        row |= {"form": "folded", "round_to": 1, "target": target}
        try:
            limit = target + (LOCAL_SLACK if setting == "local" else 0.0)
            found = at_most(lambda kept: onnx_macs(cheaper(model, 1 - kept)) / total, limit, close=0.005)
            if found is None:
                return row | {"reason": "cannot come down to the target"}
            pruned = cut(model, 1 - found[0])
            if onnx_macs(pruned) / total != found[1]:
                # Given the images it sometimes removes a channel or two more.
                found = at_most(lambda kept: onnx_macs(cut(model, 1 - kept)) / total, limit, close=0.005) or found
                pruned = cut(model, 1 - found[0])
            row |= {"kept": found[0], "macs": onnx_macs(pruned), "share": round(onnx_macs(pruned) / total, 4)}
            row |= accuracies(runner(pruned))
        except Exception as error:
            row |= {"reason": first_line(error)}
        return row | {"seconds": round(time.perf_counter() - start, 1)}

    for criterion, setting, cut, cheaper in (way for way in onnxsim_ways() if wanted.search(way[0])):
        for target in TARGETS:
            key = ("onnxsim", "folded", criterion, setting, 1, target)
            show(cells.get(key, partial(measure, criterion, setting, cut, cheaper, target)))


def show(row: Row) -> None:
    found = row.get("accuracy_2500", row.get("accuracy_500"))
    what = row.get("reason", "") if found is None else f"{found:6.2f} %" + ("" if "accuracy_2500" in row else f" of {SCREEN}")
    head = f"{row['tool']:14} {row['form']:7} {row['criterion']:38} {row['setting']:11} /{row['round_to']} {row['target']:.2f}"
    print(f"{head}  {row.get('share', 0):.4f}  {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy that the other pruners keep; results go to build/flow_channels.")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--round-to", nargs="*", type=int, default=ROUNDING)
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--criteria", default="", help="only those whose name matches this regular expression; others' stored rows stay")
    given = parser.parse_args()
    wanted = re.compile(given.criteria)
    versions = {name: metadata.version(name) for name in ("torch", "torch-pruning", "onnx2torch", "onnxsim", "onnxruntime")}
    for name in given.models:
        cells = Cells(CACHE / f"{name}_peers.json", versions)
        onnxsim_pruning(name, cells, wanted)
        for form in given.forms:
            torch_pruning(name, form, cells, tuple(given.round_to), wanted)


if __name__ == "__main__":
    main()
