"""Several processes under torchrun: each trains on its part of every batch, gradients are averaged."""

from __future__ import annotations

import atexit
from typing import Any

import torch
from torch import distributed

from relief_onnx.ranks import rank, world

__all__ = ["Processes", "gather"]


class Processes:
    """The group of processes of this run; a run in one process is a group of one."""

    def __init__(self, device: str) -> None:
        self.rank, self.world = rank(), world()
        self.device = torch.device(f"cuda:{self.rank % max(torch.cuda.device_count(), 1)}" if device == "cuda" else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        _join(device)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.all_reduce(shared)
        return float(shared) / self.world

    def wrapped(self, network: torch.nn.Module, outputs: torch.Tensor) -> Any:
        """The network with gradients averaged over processes. outputs: of one run of it; parameters that they do not need are left out."""
        if self.world == 1:
            return network
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(parameters, torch.autograd.grad(outputs, parameters, allow_unused=True), strict=True):
            parameter.requires_grad_(gradient is not None)
        return torch.nn.parallel.DistributedDataParallel(network)


def gather(value: Any) -> list[Any]:
    """What each process has, in the order of their numbers."""
    _join("cpu")
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, value)
    return found


def _join(device: str) -> None:
    """Become one of the processes; once."""
    if world() > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    """At the end of the program."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
