"""The same work over a Ray cluster: Ray Data's ``map_batches`` with one cleaner, and so one engine, an actor.

Actors read the source and write the pictures themselves, so both folders must be on a file system that every node sees;
the manifest is written by the process that started the run alone. An actor that dies is started again by Ray, and the
batch it had is done again.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from idm_fast.clean.listing import Task
from idm_fast.clean.manifest import DiskError, Record
from idm_fast.clean.work import Cleaner, Setup
from idm_fast.engine.precision import chosen_device
from idm_fast.errors import IdmFastError

_BATCHES = 4  # network batches an actor gets at a time; what is lost with it
_DISK_FULL = "disk"
_QUIET: dict[str, Any] = {"logging_level": "warning", "include_dashboard": False}
Batch = dict[str, Any]


def check_ray() -> None:
    """Raises ``IdmFastError`` with the way to install it where Ray Data is missing."""
    missing = [name for name in ("ray", "pyarrow", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise IdmFastError(f"--ray needs Ray Data, got no package {missing[0]!r}: pip install 'ray[data]'")


class _Actor:
    """Made once in each actor: loads the model, then cleans one batch of tasks after another."""

    def __init__(self, setup: Setup) -> None:
        self.cleaner = Cleaner(setup)

    def __call__(self, batch: Batch) -> Batch:
        tasks = [Task(**json.loads(text)) for text in batch["task"]]
        try:
            records = [json.dumps(record) for record in self.cleaner.run(tasks)]
        except DiskError as error:  # an exception would make Ray try again
            records = [json.dumps({_DISK_FULL: str(error)})]
        return {"record": np.array(records, dtype=object)}


def run_on_ray(setup: Setup, tasks: Sequence[Task], workers: int) -> Iterator[Record]:
    """The records of all tasks, made by ``workers`` actors; see ``Cleaner.run``.

    The cluster is the one of this process or of RAY_ADDRESS; without either one is started on this machine and ended
    with the run.
    """
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        here = not os.environ.get("RAY_ADDRESS")  # a cluster of this machine alone, which has room for all actors
        ray.init(num_cpus=max(workers, os.cpu_count() or 1) if here else None, log_to_driver=False, **_QUIET)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        size = _BATCHES * setup.options.batch_size
        rows = [{"task": json.dumps(asdict(task))} for task in tasks]
        # A block is what an actor is given, and what is done again with it.
        blocks = -(-len(rows) // size)
        most = min(workers, blocks)
        untyped: Any = ray
        # To ask at once for more than there is would wait for ever.
        room = int(untyped.cluster_resources().get("CPU", 1))
        done = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Actor,
            fn_constructor_args=(setup,),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(min_size=max(1, min(most, room)), max_size=most),
            num_gpus=1 if chosen_device(setup.options.device).type == "cuda" else 0,
        )
        for row in done.iter_rows():
            record = json.loads(row["record"])
            if _DISK_FULL in record:
                raise DiskError(record[_DISK_FULL])
            yield record
    finally:
        if started:
            ray.shutdown()
