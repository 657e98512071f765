"""One process, or many started by torchrun (or ``accelerate launch``, which sets the same environment)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Group:
    """Who this process is: ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over all processes."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def agree(self, value: int) -> int:
        """Process 0's ``value``, on every process."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared.item())

    def average(self, model: nn.Module) -> None:
        """Averages the gradients of a ``model`` that is not wrapped."""
        if self.size > 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.size

    def leave(self) -> None:
        """Waits for all, so that what process 0 wrote last is there for each, and dissolves the group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def join() -> Group:
    """Joins the group that the environment describes; alone when it describes none."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Group(rank, size, device)
