"""Several processes under torchrun: each trains on its part of every batch, gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from relief_onnx.ranks import rank, world

__all__ = ["Processes"]


class Processes:
    """The group of processes of this run; a run in one process is a group of one."""

    def __init__(self, device: str) -> None:
        self.rank, self.world = rank(), world()
        self.device = torch.device(f"cuda:{self.rank % max(torch.cuda.device_count(), 1)}" if device == "cuda" else "cpu")

    @contextmanager
    def together(self) -> Iterator[None]:
        """While training: the group is there."""
        if self.world == 1 or distributed.is_initialized():
            yield
            return
        distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()

    def wrapped(self, network: torch.nn.Module) -> Any:
        """The network with gradients averaged over processes."""
        if self.world == 1:
            return network
        return torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
