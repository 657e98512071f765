"""The cleaner: what a run finds when it is started again, a full disk, and what is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idm_fast.clean import CleanOptions, DiskError, clean, finish, manifest
from idm_fast.clean.folder import opened, parts_folder
from idm_fast.clean.listing import list_pictures, with_duplicates
from idm_fast.errors import IdmFastError

# Resuming


def test_a_finished_run_does_nothing_again(cleaning: Any) -> None:
    cleaning.run()
    times = {path: path.stat().st_mtime_ns for path in (cleaning.folder / "out").rglob("*.png")}
    summary = cleaning.run()
    assert (summary.before, summary.done, summary.pictures_per_second) == (11, 11, 0)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_limit_can_be_raised(cleaning: Any) -> None:
    assert cleaning.run(cleaning.free_but(limit=4)).total == 4
    assert len(cleaning.pictures()) == 4
    summary = cleaning.run()
    assert (summary.before, summary.done) == (4, 11)


def test_lost_or_changed_files_are_done_again(cleaning: Any) -> None:
    out = cleaning.folder / "out"
    cleaning.run()
    whole = cleaning.pictures()
    (out / "1.png").unlink()
    (out / "2.png").write_bytes(b"")  # as a power cut leaves it
    cleaning.crop(77).save(cleaning.source / "5.jpg")
    summary = cleaning.run()
    assert summary.done - summary.before == 3
    again = cleaning.pictures()
    assert [name for name in whole if whole[name] != again[name]] == ["5.png"]
    assert len(cleaning.records()) == 11


def test_a_change_of_the_same_length_is_seen_and_a_copy_is_none(cleaning: Any) -> None:
    """The time says where to look and the bytes decide, so a copy of a folder is not restored again."""
    cleaning.run()
    first, second = cleaning.source / "0.jpg", cleaning.source / "5.jpg"
    for path in cleaning.source.iterdir():
        os.utime(path, (1, 1))  # as a copy without its times
    summary = cleaning.run()
    assert summary.before == summary.done
    data = bytearray(first.read_bytes())
    data[-200] ^= 1  # within what encodes the last rows
    first.write_bytes(bytes(data))
    os.utime(second, (2, 2))
    summary = cleaning.run()
    assert summary.done - summary.before == 1


def test_what_was_made_of_a_changed_original_goes(cleaning: Any) -> None:
    """Now it cannot be read, and nothing else in the folder would say that its picture is of another."""
    cleaning.run()
    before = cleaning.pictures()
    lost, edited = cleaning.source / "5.jpg", cleaning.out / "6.png"
    lost.write_bytes(bytes(lost.stat().st_size))
    edited.write_bytes(edited.read_bytes() + b"mine")
    (cleaning.source / "6.jpg").write_bytes(b"neither")
    summary = cleaning.run()
    assert (summary.failed, summary.done - summary.before) == (2, 2)
    after = cleaning.pictures()
    assert before.keys() - after.keys() == {"5.png"}  # the other is no longer as the run left it
    assert [name for name in after if after[name] != before[name]] == ["6.png"]


def test_a_torn_last_line_is_cut_off(cleaning: Any) -> None:
    cleaning.run()
    path = cleaning.folder / "out" / "clean.jsonl"
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) - 30, len(data) - 1 - len(data.splitlines()[-1]) + 1):
        path.write_bytes(data[:length])
        summary = cleaning.run()
        assert (summary.before, summary.done) == (10, 11)
        assert sorted(path.read_bytes().splitlines()) == sorted(data.splitlines())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda line: line.replace('"kept"', '"rejected"'), "checksum"),
        (lambda line: line[:40], "clean.jsonl:2"),
        (lambda line: "# a note", "clean.jsonl:2"),
        (lambda line: "", "clean.jsonl:2"),
        (lambda line: line + "\n" + line, "has line 2 too"),
    ],
)
def test_an_edited_manifest_is_refused_with_its_line(cleaning: Any, edit: Callable[[str], str], said: str) -> None:
    cleaning.run()
    path = cleaning.folder / "out" / "clean.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = edit(lines[1])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(IdmFastError, match=said):
        cleaning.run()
    lines[1:2] = []
    if said != "has line 2 too":
        path.write_text("\n".join(lines) + "\n")
        assert cleaning.run().before == 10, "without the line its picture is done again"


def test_other_settings_are_refused_by_name(cleaning: Any) -> None:
    cleaning.run()
    other = cleaning.free_but(steps=2, blend=0.5)
    with pytest.raises(IdmFastError, match=r"options\.steps was 1, is 2; options\.blend was 1\.0, is 0\.5"):
        cleaning.run(other)
    changed = cleaning.folder / cleaning.model.name
    shutil.copy(cleaning.model, changed)
    changed.write_bytes(changed.read_bytes().replace(b'"tiny', b'"toni'))
    with pytest.raises(IdmFastError, match=r"model\.tiny\.safetensors was [0-9a-f]{64}, is [0-9a-f]{64}"):
        clean(cleaning.source, cleaning.folder / "out", changed, cleaning.free)
    shutil.copytree(cleaning.source, cleaning.folder / "moved")
    with pytest.raises(IdmFastError, match=f"source was {cleaning.source}, is {cleaning.folder / 'moved'}"):
        clean(cleaning.folder / "moved", cleaning.folder / "out", cleaning.model, cleaning.free)
    assert cleaning.run(cleaning.free_but(batch_size=2, device="cpu")).before == 11


@pytest.mark.parametrize("name", [".clean.abcdef01.json", ".clean.abcdef01.jsonl"])
def test_a_kill_in_the_middle_of_the_settings_or_the_manifest_is_survived(cleaning: Any, name: str) -> None:
    if name.endswith("l"):
        cleaning.run()
    cleaning.out.mkdir(exist_ok=True)
    (cleaning.out / name).write_text("{")
    assert cleaning.run().done == 11
    assert not (cleaning.out / name).exists()


def test_two_runs_do_not_share_an_output(cleaning: Any) -> None:
    def second(done: int, *rest: Any) -> None:
        if done == 2:
            with pytest.raises(IdmFastError, match="another run"):
                cleaning.run()

    assert cleaning.run(progress=second).done == 11


# A full disk


class Full:
    """A disk with room for so many calls of a function, then none."""

    def __init__(self, function: Callable[..., Any], room: int) -> None:
        self.function, self.room = function, room

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*args, **more)


@pytest.mark.parametrize("where", ["replace", "write", "append"])
def test_a_full_disk_ends_the_run_and_loses_nothing(cleaning: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    cleaning.run(out="reference")
    with monkeypatch.context() as patch:
        if where == "replace":
            patch.setattr(finish.os, "replace", Full(os.replace, 5))
        elif where == "write":
            write = Full(Path.write_bytes, 4)
            patch.setattr(Path, "write_bytes", lambda *args: write(*args))
        else:
            opened = manifest.Writer.__init__

            def small(self: manifest.Writer, path: Path) -> None:
                opened(self, path)
                raw = self._file

                class Small:
                    seek, truncate, close, fileno = raw.seek, raw.truncate, raw.close, raw.fileno

                    def write(self, line: bytes) -> int | None:
                        return raw.write(line if raw.tell() < 1000 else line[:37])  # the rest finds no room

                self._file = Small()  # type: ignore[assignment]

            patch.setattr(manifest.Writer, "__init__", small)
        with pytest.raises(DiskError, match=r"clean\.jsonl.* of \d+ bytes fit" if where == "append" else "No space"):
            cleaning.run()
    out = cleaning.folder / "out"
    told = cleaning.records()
    assert 0 < len(told) < 11
    assert all((out / record["output"]).stat().st_size == record["output_bytes"] for record in told.values())
    assert all(cleaning.pictures()[name] == cleaning.pictures("reference")[name] for name in cleaning.pictures()), (
        "one is torn"
    )
    summary = cleaning.run()
    assert (summary.before, summary.done, summary.failed) == (len(told), 11, 0)
    assert cleaning.pictures() == cleaning.pictures("reference")


# What is refused


def test_input_and_output_must_lie_apart(cleaning: Any) -> None:
    (cleaning.folder / "link").symlink_to(cleaning.source)
    (cleaning.folder / "up").symlink_to(cleaning.folder)
    before = cleaning.pictures("in")
    source, folder = cleaning.source, cleaning.folder
    for given, out in (
        (source, source), (source, source / "out"), (source, folder), (source, folder / "link"),
        (source, folder / "up" / "in" / "new"), (folder / "link", source / "deeper"),
    ):  # fmt: skip
        with pytest.raises(IdmFastError, match="output"):
            clean(given, out, cleaning.model, cleaning.free)
    out = cleaning.folder / "out"
    out.mkdir()
    (out / ".clean").mkdir()
    (out / "deeper").symlink_to(cleaning.source / "deeper")
    with pytest.raises(IdmFastError, match="got a link to"):
        clean(cleaning.source, out, cleaning.model, cleaning.free)
    assert cleaning.pictures("in") == before


def test_what_cannot_be_cleaned_is_said(cleaning: Any) -> None:
    (cleaning.folder / "other").mkdir()
    (cleaning.folder / "other" / "thesis.txt").write_text("mine")
    (cleaning.folder / "empty").mkdir()
    for source, out, said in (
        (cleaning.folder / "none", cleaning.folder / "out", "nothing there"),
        (cleaning.source / "0.jpg", cleaning.folder / "out", "got a file"),
        (cleaning.folder / "empty", cleaning.folder / "out", "must hold pictures"),
        (cleaning.source, cleaning.folder / "other", "other files"),
        (cleaning.source, cleaning.source / "0.jpg", "output"),
    ):
        with pytest.raises(IdmFastError, match=said):
            clean(source, out, cleaning.model, cleaning.free)
    for workers in (0, True, 1.5):
        with pytest.raises(IdmFastError, match="workers must be"):
            clean(cleaning.source, cleaning.folder / "out", cleaning.model, cleaning.free, workers=workers)  # type: ignore[arg-type]
    assert not (cleaning.folder / "out").exists()
    (cleaning.source / "0.png").mkdir()
    cleaning.crop(1).save(cleaning.source / "a.bmp")
    cleaning.crop(2).save(cleaning.source / "a.jpg")
    summary = clean(cleaning.source, cleaning.folder / "out", cleaning.model, cleaning.free)
    assert summary.failed == 0
    assert {"a.bmp.png", "a.jpg.png"} <= set(cleaning.pictures())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"blend": 1.5}, "blend must lie"),
        ({"blend": None}, "blend must be a number"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"max_identity_distance": float("nan")}, "max_identity_distance must be >= 0"),
        ({"max_low_frequency": -1.0}, "max_low_frequency must be >= 0"),
        ({"seed": -1}, "seed must lie"),
        ({"limit": 0}, "limit must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"ext": "gif"}, "ext must be auto or one of"),
        ({"aligned": "yes"}, "aligned must be"),
    ],
)
def test_wrong_options_are_named(cleaning: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(IdmFastError, match=said):
        CleanOptions(**wrong)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("name,split\na.jpg,train\n", "got no file"),
        ("file,split\n../a.jpg,train\n", "faces.csv:2"),
        ("file,split\n0.jpg,train\n/etc/passwd,train\n", "faces.csv:3"),
        ("file,split\n0.jpg\n", "faces.csv:2"),
        ("file,split\n", "must hold pictures"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(cleaning: Any, rows: str, said: str) -> None:
    (cleaning.source / "faces.csv").write_text(rows)
    with pytest.raises(IdmFastError, match=said):
        list_pictures(cleaning.source, None, None)


def test_aligned_crops_are_known_by_their_sizes(cleaning: Any) -> None:
    assert list_pictures(cleaning.source, None, None).aligned
    cleaning.crop(1, 64).save(cleaning.source / "larger.png")
    assert not list_pictures(cleaning.source, None, None).aligned
    assert list_pictures(cleaning.source, True, None).tasks[0].output == "0.png"
    assert list_pictures(cleaning.source, False, None).tasks[0].output == "0.jpg"


def test_duplicates_are_files_of_the_same_bytes(cleaning: Any) -> None:
    shutil.copy(cleaning.source / "1.jpg", cleaning.source / "0.png")  # another extension is another treatment
    size = (cleaning.source / "5.jpg").stat().st_size
    (cleaning.source / "z.jpg").write_bytes(b"x" + (cleaning.source / "5.jpg").read_bytes()[1:])
    assert (cleaning.source / "z.jpg").stat().st_size == size
    tasks = with_duplicates(cleaning.source, list_pictures(cleaning.source, True, None).tasks)
    assert {task.name: task.duplicate_of for task in tasks if task.duplicate_of} == {"deeper/again.jpg": "3.jpg"}


def test_what_a_killed_worker_left_unfinished_goes_with_its_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out, {"version": 1}):
        (parts_folder(out) / ".7-3.f03b.png").write_bytes(b"")
        (parts_folder(out) / "7-3.png").write_bytes(b"half")
    assert not any(parts_folder(out).iterdir())
