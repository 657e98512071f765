"""The cleaner over Ray: a local cluster of two workers, one of them killed half way; and without Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from idm_fast.clean import clean
from idm_fast.clean.ray_data import check_ray
from idm_fast.cli import main
from idm_fast.errors import IdmFastError


def test_a_missing_ray_says_how_to_get_it(
    cleaning: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    with pytest.raises(IdmFastError, match=r"got no package 'ray': pip install 'ray\[data\]'"):
        check_ray()
    assert main(["clean", str(cleaning.source), str(cleaning.out), "--model", str(cleaning.model), "--ray"]) == 2
    assert "pip install 'ray[data]'" in capsys.readouterr().err
    assert not cleaning.out.exists()


def actors_of(pid: int) -> list[int]:
    """Ray's actors of a run, somewhere below its process."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return [each for each in below if b"MapWorker" in names.get(each, b"")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="actors are found in /proc")
def test_a_local_cluster_does_what_one_process_does_though_a_worker_is_killed(cleaning: Any) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
    for number in range(20, 69):
        cleaning.crop(number).save(cleaning.source / f"{number}.png")
    options = cleaning.free_but(batch_size=2)
    clean(cleaning.source, cleaning.folder / "reference", cleaning.model, options)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "idm_fast", "clean", str(cleaning.source), str(cleaning.out), "--ray", "--workers",
            "2", "--model", str(cleaning.model), "--steps", "1", "--batch-size", "2", "--max-identity-distance", "none",
            "--max-low-frequency", "none", "--json",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Ray makes its workers nice, which on a machine with other work may mean that they do not run at all.
        env=os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    manifest = cleaning.out / "clean.jsonl"
    while process.poll() is None and not (manifest.exists() and len(manifest.read_bytes().splitlines()) >= 8):
        time.sleep(0.02)
    actors = actors_of(process.pid)
    assert len(actors) == 2, process.communicate()[1]
    os.kill(actors[0], signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    summary = json.loads(out)
    assert (summary["total"], summary["failed"], summary["kept"]) == (60, 0, 59)
    assert cleaning.pictures() == cleaning.pictures("reference")
    assert cleaning.records() == cleaning.records("reference")
