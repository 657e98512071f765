"""What an evaluation leaves and finds on disk: unfinished parts, and pictures of any name."""

from __future__ import annotations

import os
from pathlib import Path

from idm_fast.evaluation.parts import Parts
from idm_fast.evaluation.pictures import fingerprint


def test_a_kill_in_the_middle_of_a_part_is_survived(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in (".settings.abcdefgh.json", ".faces-000000.abcdefgh.safetensors"):
        (tmp_path / "parts" / name).write_text("{")
        Parts(tmp_path / "parts", {"seed": 0})


def test_a_name_that_is_no_text_has_a_fingerprint(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(b"1")
    before = fingerprint([path])
    path.write_bytes(b"22")
    assert fingerprint([path]) != before
