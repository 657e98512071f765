"""Files that are either whole or absent, whenever a signal comes."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from idm_fast import files
from idm_fast.cli import Terminated


class _Signal:
    """Raises ``Terminated`` at the ``at``-th instruction of ``atomic``, as a handler does."""

    def __init__(self, at: int) -> None:
        self.left, self.came = at, False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != files.__file__ or frame.f_code.co_name != "atomic":
            return self if "contextlib" in frame.f_code.co_filename else None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left < 0 and not self.came:
                self.came = True
                raise Terminated
        return self


@pytest.mark.parametrize("before", [None, "old"])
def test_a_signal_at_any_moment_leaves_nothing_behind(before: str | None, tmp_path: Path) -> None:
    path, tracing = tmp_path / "x.json", sys.gettrace()
    texts: set[str | None] = set()
    for at in count():
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before)
        signal = _Signal(at)
        sys.settrace(signal)
        try:
            with files.atomic(path) as temporary:
                temporary.write_text("new")
        except Terminated:
            pass
        finally:
            sys.settrace(tracing)
        texts.add(path.read_text() if path.exists() else None)
        assert {each.name for each in tmp_path.iterdir()} <= {"x.json"}, at
        if not signal.came:
            break
    assert texts == {before, "new"}
    assert at > 50


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "state.pt", tmp_path / "state.old.pt"
    with files.atomic(path) as temporary:
        pass
    temporary.touch()  # a name that ``atomic`` itself has given
    other.touch()
    foreign = tmp_path / ".state.old-back.pt"  # as long, but no name of ours
    foreign.touch()
    with files.atomic(path) as temporary:
        temporary.write_text("half")
        files.clear_unfinished(path)  # by another run in the same folder
        assert temporary.exists()
    assert sorted(tmp_path.iterdir()) == [foreign, other, path]
    assert path.read_text() == "half"
