"""The cleaner killed: the whole run at any moment, one of its workers, and by Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idm_fast.clean import clean
from idm_fast.errors import IdmFastError

# A restorer that takes a while, so that the moment of a kill falls into the work; as a command, and as a server that
# forks a command for each line it reads: all that a run needs is imported once. One that is to be killed never gets
# over the last picture, so that a busy machine, on which the killer comes late, does not let it end.
_SLOW = """
import json, os, sys, time
from idm_fast.clean import work
from idm_fast.cli import clean, main
restore = work.Cleaner._batch
last = None
def slow(self, model, batch):
    time.sleep(120 if any(each.task.name == last for each, _ in batch) else 0.05)
    restore(self, model, batch)
work.Cleaner._batch = slow
if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(main(sys.argv[1:]))
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            last, words = json.loads(line)
            os._exit(main(words))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def arguments(cleaning: Any, *more: str) -> list[str]:
    options = ["--steps", "1", "--batch-size", "2", "--max-identity-distance", "none", "--max-low-frequency", "none"]
    return ["clean", str(cleaning.source), str(cleaning.out), "--model", str(cleaning.model), *options, *more]


def command(cleaning: Any, *more: str, before: str = "") -> list[str]:
    script = cleaning.folder / "slow.py"
    script.write_text(before + _SLOW)
    return [sys.executable, str(script), *arguments(cleaning, *more)]


def lines(out: Path) -> list[bytes]:
    try:
        return (out / "clean.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []


@pytest.fixture
def more(cleaning: Any) -> Any:
    """Sixty crops, and what they become without any interruption in ``reference``."""
    for number in range(20, 69):
        cleaning.crop(number).save(cleaning.source / f"{number}.png")
    clean(cleaning.source, cleaning.folder / "reference", cleaning.model, cleaning.free_but(batch_size=2))
    return cleaning


def check(cleaning: Any) -> None:
    """Nothing lost, torn or repeated, and every picture as it would have been."""
    assert cleaning.pictures() == cleaning.pictures("reference")
    assert cleaning.records() == cleaning.records("reference")
    assert not list((cleaning.out / ".clean" / "parts").iterdir())


class Server:
    """Runs of the command, one after another, each a process of its own."""

    def __init__(self, cleaning: Any) -> None:
        self.process = subprocess.Popen(
            command(cleaning)[:2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # a fork would lose the others
        )  # fmt: skip

    def start(self, words: list[str], endless: bool) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(["deeper/9.png" if endless else None, words]) + "\n")
        self.process.stdin.flush()
        return self._number()

    def ended(self) -> int:
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return int(line)


def test_twenty_kills_at_random_moments_lose_nothing(more: Any) -> None:
    """SIGKILL after a random number of further records and a random while; each run goes on from the one before."""
    rng = np.random.default_rng(0)
    reference = more.pictures("reference")
    server = Server(more)
    before = b""
    for _ in range(20):
        pid = server.start(arguments(more), endless=True)
        done = before.count(b"\n")
        enough = min(done + int(rng.integers(0, 4)), 50)
        until = time.monotonic() + 60
        while len(lines(more.out)) < enough and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.1)))
        os.kill(pid, signal.SIGKILL)
        assert server.ended() == -signal.SIGKILL
        now = b"".join(lines(more.out))
        assert now.startswith(before), "a record was lost"
        before = now[: now.rfind(b"\n") + 1]
        whole = {name: data for name, data in more.pictures().items() if not name.startswith(".clean/")}
        assert whole.items() <= reference.items(), "a picture is torn"
    server.start(arguments(more), endless=False)
    assert server.ended() == 0
    server.process.communicate(timeout=60)
    assert b"".join(lines(more.out)).startswith(before)
    check(more)


def test_ctrl_c_ends_a_run_whole(more: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits it where a shell ignores it
    try:
        process = subprocess.Popen(command(more), stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while len(lines(more.out)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert 5 <= len(lines(more.out)) < 60
    assert subprocess.run(command(more), capture_output=True, timeout=120).returncode == 0
    check(more)


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run: children of the server that multiprocessing forks them from."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    servers = {child for child, parent in parents.items() if parent == pid}
    return [child for child, parent in parents.items() if parent in servers]


@pytest.fixture
def workers(more: Any) -> Iterator[subprocess.Popen[str]]:
    """A run with two workers that has begun to write."""
    process = subprocess.Popen(
        command(more, "--workers", "2", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(lines(more.out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc")
def test_a_killed_worker_is_replaced_and_its_pictures_are_done_again(more: Any, workers: Any) -> None:
    victims = workers_of(workers.pid)
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    out, said = workers.communicate(timeout=120)
    assert workers.returncode == 0, said
    assert json.loads(out)["failed"] == 0
    check(more)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc")
def test_workers_do_not_outlive_their_run(more: Any, workers: Any) -> None:
    victims = workers_of(workers.pid)
    workers.kill()
    workers.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in victims) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in victims if Path(f"/proc/{pid}").exists()]
    assert subprocess.run(command(more, "--workers", "2"), capture_output=True, timeout=120).returncode == 0
    check(more)


# Every worker that gets this picture dies of it, as of a decoder that crashes.
_DEADLY = """
import os
from idm_fast.clean import work
prepare = work.Cleaner._prepare
def deadly(self, task, pixels):
    if task.name == "5.jpg":
        os._exit(11)
    return prepare(self, task, pixels)
work.Cleaner._prepare = deadly
"""


def test_a_picture_that_kills_its_workers_is_found_and_recorded(more: Any) -> None:
    words = command(more, "--workers", "2", "--json", before=_DEADLY)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["failed"], summary["total"]) == (1, 60)
    assert "its worker died 3 times" in done.stderr
    assert "5.jpg" in done.stderr
    assert more.records()["5.jpg"]["result"] == "failed"
    assert "5.png" not in more.pictures()


def test_what_workers_cannot_begin_with_is_said_once(cleaning: Any) -> None:
    with pytest.raises(IdmFastError, match="sampler"):
        cleaning.run(cleaning.free_but(sampler="none such"), workers=2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="memory is read in /proc")
def test_memory_does_not_grow_with_the_set(cleaning: Any) -> None:
    """64-px pictures with their crops are about 100 KB each: 400 of them kept would be 40 MB."""
    for number in range(600):
        cleaning.crop(number, 64).save(cleaning.source / f"more{number:03d}.png")
    seen: dict[int, float] = {}

    def progress(done: int, *rest: Any) -> None:
        seen[done] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    cleaning.run(cleaning.free_but(batch_size=8, aligned=True), progress=progress)
    assert seen[600] - seen[200] < 8
