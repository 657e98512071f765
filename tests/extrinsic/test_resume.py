"""Rounds that are stopped anywhere end with the same weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.training import extrinsic
from idm_fast.training.extrinsic import Rounds
from idm_fast.training.intrinsic import Trainer
from idm_fast.training.rounds import Ledger, Part, RoundSettings


class _Stop(BaseException):
    """As sudden as Ctrl-C."""


def _stop_every(monkeypatch: pytest.MonkeyPatch, events: int) -> Callable[[], list[str]]:
    """Stops the run at every ``events``-th training step, cleaned picture or finished part; returns what it cut off."""
    seen = [0]
    cut: list[str] = []
    step, finish, real = Trainer._step, Ledger.finish, extrinsic.clean

    def event(name: str) -> None:
        seen[0] += 1
        if seen[0] % events == 0:
            cut.append(name)
            raise _Stop

    def counted_step(self: Trainer, x0: Tensor, y: Tensor) -> dict[str, float]:
        event(f"train {self.settings.out.name}")
        return step(self, x0, y)

    def counted_finish(self: Ledger, part: Part, facts: dict[str, Any]) -> None:
        event(f"finish {part.name}")
        finish(self, part, facts)

    def counted_clean(source: Path, out: Path, *rest: Any, progress: Any, **named: Any) -> Any:
        def told(*news: Any) -> None:
            progress(*news)
            event(f"clean {out.name}")

        return real(source, out, *rest, progress=told, **named)

    monkeypatch.setattr(Trainer, "_step", counted_step)
    monkeypatch.setattr(Ledger, "finish", counted_finish)
    monkeypatch.setattr(extrinsic, "clean", counted_clean)
    return lambda: cut


@pytest.mark.parametrize("events", [4, 7])
def test_stopped_anywhere_it_ends_with_the_same_weights(
    kit: Any, settings: RoundSettings, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    whole = kit.elsewhere(settings, "whole")
    Rounds(whole).run()
    with monkeypatch.context() as patch:
        cut = _stop_every(patch, events)
        for _ in range(60):
            torch.manual_seed(99)  # states of the process must not matter
            try:
                finished = Rounds(settings).run()
                break
            except _Stop:
                continue
    assert finished
    assert {each.split()[0] for each in cut()} == {"train", "clean", "finish"} if events == 4 else len(cut()) > 3
    kit.check_same(settings, whole)


def test_a_budget_stops_every_part_and_each_call_comes_forward(
    kit: Any, settings: RoundSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(settings, rounds=1, control=False)
    whole = kit.elsewhere(settings, "whole")
    Rounds(whole).run()
    capsys.readouterr()
    stops = []
    for _ in range(40):
        if Rounds(settings).run(budget_minutes=1e-9):
            break
        stops.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert f"{settings.first.out}: stopped before the end of train round-0; the same command goes on" in stops
    assert f"{settings.first.out}: stopped before the end of clean data-1; the same command goes on" in stops
    assert f"{settings.first.out}: stopped before the end of train round-1; the same command goes on" in stops
    for name in ("round-0", "round-1"):
        assert not kit.differ(kit.weights(settings, name), kit.weights(whole, name))
    assert kit.pixels(settings, "data-1") == kit.pixels(whole, "data-1")


def test_a_finished_run_does_nothing_again(settings: RoundSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(settings, rounds=1)
    Rounds(settings).run()
    before = {path: path.stat().st_mtime_ns for path in settings.first.out.rglob("*") if "table" not in path.name}
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trains again"))
    monkeypatch.setattr(extrinsic, "clean", lambda *_, **__: pytest.fail("cleans again"))
    assert Rounds(settings).run()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_state_left_behind_by_a_kill_is_no_harm(settings: RoundSettings) -> None:
    """Between the record of a finished part and the removal of its state."""
    settings = replace(settings, rounds=1, control=False)
    Rounds(settings).run()
    left = settings.first.out / "round-0" / "state.pt"
    left.write_bytes(b"half")
    assert Rounds(settings).run()
    assert not left.exists()


KILLED = """
import os
import signal

from idm_fast.training.intrinsic import Trainer
from idm_fast.training import extrinsic, round_table

left = {events}

def event():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

step, real = Trainer._step, extrinsic.clean

def counted_step(self, x0, y):
    event()
    return step(self, x0, y)

def counted_clean(*rest, progress, **named):
    def told(*news):
        progress(*news)
        event()
    return real(*rest, progress=told, **named)

Trainer._step, extrinsic.clean = counted_step, counted_clean
"""


@pytest.mark.slow
def test_killed_while_cleaning_and_while_training(kit: Any, given: RoundSettings, tmp_path: Path) -> None:
    whole = kit.elsewhere(given, "whole")
    Rounds(whole).run()
    for events in (5, 9):  # the fourth picture; the fourth step or so after what is left of the pictures
        script = tmp_path / f"killed-{events}.py"
        script.write_text(KILLED.format(events=events) + kit.script())
        done = subprocess.run([sys.executable, str(script), *kit.command(given)], capture_output=True, timeout=240)
        assert done.returncode == -9, done.stderr[-3000:]
    assert (given.first.out / "round-1" / "state.pt").exists()
    Rounds(given).run()
    assert kit.pixels(given, "data-1") == kit.pixels(whole, "data-1")
    assert not kit.differ(kit.weights(given, "round-1"), kit.weights(whole, "round-1"))
    parts = given.first.out / "data-1" / ".clean" / "parts"
    assert not parts.exists() or not any(parts.iterdir())


def _launch(script: Path, arguments: list[str], processes: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with subprocess.Popen([*command, str(script), *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=240)[1]
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its children; killed, it would leave them
            pytest.fail("the processes hang")
    assert process.returncode == 0, said[-6000:]
    return said


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(kit: Any, given: RoundSettings, tmp_path: Path) -> None:
    """One of the two cleans while the other waits; a budget stops both at one place, and both go on from it."""
    one = replace(given, first=replace(given.first, batch_size=8, out=tmp_path / "one"))
    Rounds(one).run()
    script = tmp_path / "rounds.py"
    script.write_text(kit.script())
    command = kit.command(given)
    stopped = _launch(script, [*command, "--budget-minutes", "1e-9"], 2)
    assert stopped.count("the same command goes on") == 1  # one process speaks
    said = _launch(script, command, 2)
    assert said.count("1 rounds finished") == 1
    assert kit.pixels(given, "data-1") == kit.pixels(one, "data-1")
    start = native.load(tmp_path / "start.safetensors").module.state_dict()
    a, b = kit.weights(one, "round-1"), kit.weights(given, "round-1")
    apart = sum(float((a[key] - b[key]).square().sum()) for key in start) ** 0.5
    moved = sum(float((a[key] - start[key]).square().sum()) for key in start) ** 0.5
    assert apart < 0.05 * moved
