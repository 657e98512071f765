"""The model file: what is saved comes back, and every kind of broken file is one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from idm_fast.checkpoints import native
from idm_fast.config import ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

CONFIG = ModelConfig("tiny", UNetConfig(16, 8, (1, 2), (1, 1), cond_channels=3, residual=True, norm_groups=4))
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def module() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG.unet)


@pytest.fixture
def file(module: UNet, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    native.save(path, module, CONFIG, {"steps": 3}, torch.float16)
    return path


def _header() -> dict[str, Any]:
    return {"format": 1, "config": CONFIG.to_dict(), "notes": {}}


def _rewrite(path: Path, header: object = None, change: Callable[[Tensors], object] | None = None) -> None:
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    text = header if isinstance(header, str) else json.dumps(_header() if header is None else header)
    save_file(tensors, path, metadata={"idm_fast": text})


def _refused(path: Path, message: str) -> None:
    with pytest.raises(IdmFastError, match=message) as caught:
        native.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_saved_comes_back(module: UNet, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "new folder" / "tiny.safetensors"
    native.save(path, module, CONFIG, {"steps": 3, "by": "test"}, dtype)
    loaded = native.load(path)
    assert loaded.config == CONFIG
    assert loaded.notes == {"steps": 3, "by": "test"}
    assert not loaded.module.training
    for (name, parameter), (_, original) in zip(
        loaded.module.named_parameters(), module.named_parameters(), strict=True
    ):
        assert parameter.dtype == torch.float32, name
        assert not parameter.requires_grad, name
        assert torch.equal(parameter, original.detach().to(dtype).float()), name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_a_loaded_model_does_not_hang_on_its_file(file: Path) -> None:
    module = native.load(file).module
    before = module.stem.weight.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(module.stem.weight, before)


def test_weights_that_the_file_cannot_hold_are_not_written(module: UNet, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(b"the old one")
    torch.nn.init.constant_(module.stem.weight, 1e6)  # inf in fp16
    with pytest.raises(IdmFastError, match=r"weights must be finite in torch.float16, got inf or nan in \['stem"):
        native.save(path, module, CONFIG, {}, torch.float16)
    assert path.read_bytes() == b"the old one"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written(module: UNet, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(IdmFastError, match=r"file/tiny.safetensors: cannot be written: "):
        native.save(blocker / "tiny.safetensors", module, CONFIG, {}, torch.float16)
    folder = tmp_path / "tiny.safetensors"
    folder.mkdir()
    with pytest.raises(IdmFastError, match=r"tiny.safetensors: cannot be written: Is a directory"):
        native.save(folder, module, CONFIG, {}, torch.float16)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "tiny.safetensors"]


def test_no_file(tmp_path: Path) -> None:
    _refused(tmp_path / "none.safetensors", "must be a weights file .*, got nothing there")
    _refused(tmp_path, "must be a weights file .*, got a folder")


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"PK\x03\x04" + b"\0" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"\xff" * 64, b"\0" * 64],
    ids=["empty", "short", "zip", "png", "huge header", "no header"],
)
def test_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    _refused(path, "must be a safetensors file with a header")


def test_a_header_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((16).to_bytes(8, "little") + b"{" * 16 + b"\0" * 64)
    _refused(path, "is not a whole safetensors file")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_truncated_file(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    _refused(file, "is not a whole safetensors file|must be a safetensors file")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "header 'idm_fast' must be JSON"),
        ("[" * 100_000, "header 'idm_fast' must be JSON"),
        ([1], r"format must be 1, got \[1\]"),
        ({"format": 2, "config": {}}, "format must be 1, got 2"),
        ({"format": 1}, "header must hold a 'config'"),
        ({"format": 1, "config": 7}, "must hold a table of ModelConfig keys, got 7"),
        ({"format": 1, "config": {"name": "x"}}, "missing 1 required positional argument: 'unet'"),
        (_header() | {"notes": 1}, "a table of 'notes'"),
        (_header() | {"config": CONFIG.to_dict() | {"colour": "red"}}, r"unknown ModelConfig keys \['colour'\]"),
        (
            _header() | {"config": CONFIG.to_dict() | {"unet": CONFIG.to_dict()["unet"] | {"norm_groups": 5}}},
            "channels must be a multiple of norm_groups = 5, got 8",
        ),
    ],
)
def test_a_header_that_does_not_fit(file: Path, header: object, message: str) -> None:
    _rewrite(file, header)
    _refused(file, message)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    _refused(path, r"header must hold the key 'idm_fast', got \[\]")


def test_an_enormous_network_costs_nothing(file: Path) -> None:
    unet = CONFIG.to_dict()["unet"] | {"model_channels": 1 << 20, "norm_groups": 4}
    _rewrite(file, _header() | {"config": CONFIG.to_dict() | {"unet": unet}})
    _refused(file, r"must be \(.*\), got \(")


def _poison(tensors: Tensors) -> None:
    tensors["stem.weight"][0, 0, 0, 0] = torch.nan


def _wrong_shape(tensors: Tensors) -> None:
    tensors["stem.bias"] = torch.zeros(9, dtype=torch.float16)


def _wrong_type(tensors: Tensors) -> None:
    tensors["stem.bias"] = torch.zeros(8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("stem.bias"), r"1 tensors missing \['stem.bias'\], 0 unexpected"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"0 tensors missing \[\], 1 unexpected \['extra'\]"),
        (_wrong_shape, r"stem.bias must be \(8,\), got \(9,\)"),
        (_wrong_type, r"stem.bias must be one of .*, got I32"),
        (_poison, r"weights must be finite, got inf or nan in 1 of them \['stem.weight'\]"),
    ],
    ids=["missing", "extra", "shape", "type", "nan"],
)
def test_tensors_that_do_not_fit(file: Path, change: Callable[[Tensors], object], message: str) -> None:
    _rewrite(file, change=change)
    _refused(file, message)
