"""SIGTERM and the processes of a command; what it leaves behind is in test_cli.py."""

from __future__ import annotations

import signal
import time
from multiprocessing import get_context
from threading import Thread
from typing import Any

import pytest

from idm_fast.cli import Terminated, _terminable


def _work(runs: Any) -> None:
    runs.set()
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_dies_of_sigterm_and_cleans_nothing_up() -> None:
    """Its parent's files are not its own."""
    with _terminable():
        fork = get_context("fork")
        runs = fork.Event()
        worker = fork.Process(target=_work, args=(runs,))
        worker.start()
        assert runs.wait(30)  # Python forgets a signal that comes in the middle of the fork
        worker.terminate()
        worker.join(30)
    assert worker.exitcode == -signal.SIGTERM


def test_who_has_said_what_sigterm_does_is_not_overruled() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with _terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_only_the_main_thread_may() -> None:
    def walk() -> None:
        with _terminable():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = Thread(target=walk)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
    with pytest.raises(Terminated), _terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
