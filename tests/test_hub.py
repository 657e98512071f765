"""Names of the Hugging Face Hub, with a library of our own making in the place of the real one: nothing is fetched."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from idm_fast import hub
from idm_fast.errors import IdmFastError
from idm_fast.registry import Target, find_files, load_models

FOLDER = [
    "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
]  # fmt: skip


class Library:
    """``huggingface_hub`` with one repository of the given files; ``asked`` is what was wanted of it."""

    def __init__(self, place: Path, files: list[str], *, online: bool = True) -> None:
        self.place, self.files, self.online = place, files, online
        self.asked: list[tuple[Any, ...]] = []

    def list_repo_files(self, repo: str, *, revision: str | None) -> list[str]:
        if not self.online:
            raise OSError("no route to huggingface.co\nand more lines of it")
        self.asked.append(("list", repo, revision))
        return self.files

    def snapshot_download(
        self,
        repo: str,
        *,
        revision: str | None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        if local_files_only:
            if not any(self.place.iterdir()):
                raise OSError("nothing cached")
            return str(self.place)
        self.asked.append(("get", repo, revision, allow_patterns))
        return str(self.place)


def installed(monkeypatch: pytest.MonkeyPatch, place: Path, files: list[str], *, online: bool = True) -> Library:
    place.mkdir(exist_ok=True)
    made = Library(place, files, online=online)
    names = {name: getattr(made, name) for name in ("list_repo_files", "snapshot_download")}
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(**names))
    return made


@pytest.mark.parametrize("name", ["google/ddpm-celebahq-256", "a/b", "owner/name@main", "owner/v1.0_x"])
def test_what_looks_like_an_id(name: str) -> None:
    assert hub.looks_like_id(name)


@pytest.mark.parametrize(
    "name",
    ["idm-face", "a/b/c", "/a/b", "./a", "../a/b", "~/models", "models/x.safetensors", "models/x.pth", "a/", "a/b@"],
)
def test_what_does_not(name: str) -> None:
    assert not hub.looks_like_id(name)


def test_only_the_network_s_own_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = installed(monkeypatch, tmp_path / "cache", FOLDER)
    assert hub.fetch("owner/faces@v2") == tmp_path / "cache"
    wanted = {
        "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json",
        "scheduler/scheduler_config.json",
    }  # fmt: skip
    (first, second) = library.asked
    assert first == ("list", "owner/faces", "v2")
    assert (second[:3], set(second[3])) == (("get", "owner/faces", "v2"), wanted)


def test_one_weights_file_is_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    installed(monkeypatch, tmp_path / "cache", ["README.md", "tiny.safetensors"])
    shutil.copy(tiny_model, tmp_path / "cache" / "tiny.safetensors")
    assert hub.fetch("owner/tiny") == tmp_path / "cache" / "tiny.safetensors"
    (model,) = load_models("owner/tiny", Target("cpu", "fp32"))
    assert model.config.name == "tiny"


def test_a_path_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    """A folder of the name here, and a misspelt file: nobody asks the Hub."""
    library = installed(monkeypatch, tmp_path / "cache", FOLDER)
    (tmp_path / "owner" / "faces").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_files("owner/faces") == [Path("owner/faces")]
    assert find_files("owner/gone.safetensors") == [Path("owner/gone.safetensors")]
    with pytest.raises(IdmFastError, match=r"owner/gone\.safetensors: .* nothing there"):
        load_models("owner/gone.safetensors", Target("cpu", "fp32"))
    with pytest.raises(IdmFastError, match="model must be idm-face"):
        find_files("nonsense")
    assert not library.asked


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        IdmFastError, match=r"owner/faces: nothing of this name is here, .* \(pip install huggingface_hub\)"
    ):
        find_files("owner/faces")


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an earlier run has kept is used; without it the reason is said, in one line."""
    installed(monkeypatch, tmp_path / "cache", [], online=False)
    with pytest.raises(IdmFastError, match=r"did not give it: no route to huggingface\.co$"):
        hub.fetch("owner/faces")
    for name in FOLDER:
        (tmp_path / "cache" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cache" / name).touch()
    assert hub.fetch("owner/faces") == tmp_path / "cache"


def test_a_repository_of_many_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for files in (["a.safetensors", "b.ckpt"], ["README.md"]):
        installed(monkeypatch, tmp_path / "cache", files)
        with pytest.raises(IdmFastError, match=r"must hold a diffusers model or one weights file, got \d of them"):
            hub.fetch("owner/faces")
