"""One process, or many started by torchrun (or ``accelerate launch``, which sets the same environment)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from idm_fast.errors import IdmFastError

_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Group:
    """Who this process is: ``rank`` of ``size``, on ``device``. ``patient``: the same processes, for long waits."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

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

    def add_up(self, values: torch.Tensor) -> None:
        """``values`` of all processes, summed in place."""
        if self.size > 1:
            dist.all_reduce(values)

    def broadcast(self, values: torch.Tensor) -> None:
        """Process 0's ``values``, in place on every process."""
        if self.size > 1:
            dist.broadcast(values, 0)

    def on_main(self, work: Callable[[], None]) -> None:
        """Process 0 does ``work`` while the others wait, however long; where it raises, all of them do."""
        failure: Exception | None = None
        if self.is_main:
            try:
                work()
            except Exception as error:
                failure = error
        if self.size > 1:
            verdict = torch.tensor([int(failure is not None)])
            dist.broadcast(verdict, 0, group=self.patient)
            if failure is None and verdict.item():
                raise IdmFastError("process 0 must finish its part, got an error there; it names it")
        if failure is not None:
            raise failure

    def leave(self) -> None:
        """Waits for all, so that what process 0 wrote last is there for each, and dissolves the group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def own_device() -> torch.device:
    """Where this process computes: the CUDA device of its number on this machine, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def join(patient: bool = False) -> Group:
    """Joins the group that the environment describes; alone when it describes none.

    ``patient``: processes will wait longer than the minutes after which a collective gives up (``Group.on_main``).
    Those waits get a group of their own, over the CPU, so that a hanging training step is still found in minutes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = own_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    long_waits: dist.ProcessGroup | None = None
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        if patient:
            long_waits = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Group(rank, size, device, long_waits)
