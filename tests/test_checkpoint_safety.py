"""Files that lie, are broken or want to run something: one line that names file and trouble, and nothing is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from idm_fast import checkpoints
from idm_fast.checkpoints.format import modules_to_names
from idm_fast.checkpoints.guided_keys import modules
from idm_fast.cli import main
from idm_fast.config import UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

Tensors = dict[str, Tensor]
SETTINGS = {"num_head_channels": 32, "image_size": 16}


def state() -> Tensors:
    unet = UNet(UNetConfig(16, 32, (1, 2), (1, 1), (1,), num_head_channels=32))
    own = unet.state_dict()
    return {theirs: own[ours].clone() for ours, (theirs,) in modules_to_names(unet, modules(unet)).items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def refused(path: Path, message: str, settings: dict[str, Any] | None = None) -> None:
    for read in (checkpoints.load, checkpoints.describe):
        with pytest.raises(IdmFastError, match=message) as caught:
            read(path, SETTINGS if settings is None else settings)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


class Evil:
    """Whoever unpickles it in earnest runs a command."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def evil(marker: Path) -> dict[str, Any]:
    return {
        "posix.system": Evil(os.system, f"touch {marker}"),
        "builtins.eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": Evil(getattr, "text", "upper"),
        "torch.hub.load": Evil(torch.hub.load, "x/y", "z"),
        "torch.load": Evil(torch.load, str(marker)),
        "builtins.exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
    }


@pytest.mark.parametrize("container", ["zip", "before 1.6", "pickle 2", "pickle 4", "pickle 5"])
@pytest.mark.parametrize("name", sorted(evil(Path("x"))))
def test_a_file_that_wants_to_run_something(name: str, container: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "was run", tmp_path / "a.ckpt"
    tree = {"state_dict": state(), "extra": evil(marker)[name]}
    if container.startswith("pickle"):
        path.write_bytes(pickle.dumps(tree, protocol=int(container[-1])))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=container == "zip")
    refused(path, f"refused the global .*{name.rpartition('.')[2]}")
    assert not marker.exists()


def test_a_stand_in_is_never_the_thing_itself(tmp_path: Path) -> None:
    """Names of trainers are answered by something inert, wherever they stand."""
    marker, path = tmp_path / "was run", tmp_path / "a.ckpt"
    torch.save({"state_dict": state(), "x": Evil(os.system, f"touch {marker}")}, tmp_path / "b.ckpt")
    with zipfile.ZipFile(tmp_path / "b.ckpt") as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"cposix\nsystem\n" in content
                content = content.replace(b"cposix\nsystem\n", b"comegaconf.x\nsystem\n")
            target.writestr(entry, content)
    assert checkpoints.load(path, SETTINGS).config.unet.model_channels == 32
    assert not marker.exists()


def test_names_of_globals_are_shown_harmlessly(tmp_path: Path) -> None:
    for name in ("sys\x1b[31mtem", "x" * 100_000):
        (tmp_path / "a.pt").write_bytes(f"\x80\x02cos\n{name}\n)R.".encode("latin1"))
        with pytest.raises(IdmFastError, match=r"refused the global 'os\.") as caught:
            checkpoints.load(tmp_path / "a.pt")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(kept: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    refused(file, "is not a whole torch file|must be a torch file")


def test_a_truncated_file_of_early_torch(file: Path) -> None:
    torch.save(state(), file, _use_new_zipfile_serialization=False)
    assert checkpoints.load(file, SETTINGS).source["format"] == "guided-diffusion"
    content = file.read_bytes()
    for kept in (0.01, 0.5, 0.99):
        file.write_bytes(content[: int(len(content) * kept)])
        refused(file, "is not a whole torch file")


def test_flipped_bits(file: Path) -> None:
    """Whatever is damaged, it is our error or a network that is whole. Half of the flips hit the pickle."""
    content = file.read_bytes()
    draw, program = torch.Generator().manual_seed(0), content.index(b"PK", 1000)
    for round_ in range(24):
        damaged = bytearray(content)
        end = program if round_ % 2 else len(content)
        for place in torch.randint(end, (5,), generator=draw).tolist():
            damaged[place] ^= 0x55
        file.write_bytes(damaged)
        with suppress(IdmFastError):  # anything else fails
            loaded = checkpoints.load(file, SETTINGS)
            assert all(torch.isfinite(parameter).all() for parameter in loaded.module.parameters())


def test_zip_bombs(file: Path, tmp_path: Path) -> None:
    (twice := tmp_path / "twice.pt").write_bytes(file.read_bytes())
    with zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    refused(twice, f"^{twice}: must be a torch file = an archive with one data.pkl, got ")
    for method, name in ((zipfile.ZIP_DEFLATED, "squeezed"), (zipfile.ZIP_STORED, "plain")):
        path = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("archive/data.pkl", b"\0" * (1 << 22))
        refused(path, "must be a torch file, which is not compressed|is not a whole torch file")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("word/document.xml", b"<xml/>")
    refused(tmp_path / "other.pt", r"an archive with one data.pkl, got \['word/document.xml'\]")


def test_a_tensor_of_more_elements_than_bytes(file: Path) -> None:
    """Copied out, it would fill the memory."""
    torch.save(state() | {"time_embed.0.weight": torch.zeros(1).expand(1 << 20, 1 << 18)}, file)
    refused(file, "time_embed.0.weight must have its 1099511627776 bytes, got 4 stored")
    shared = torch.zeros(1 << 16)
    torch.save({f"w{i}": shared for i in range(100)}, file)
    refused(file, "tensors must fit into the file's .* bytes, got 26214400 bytes of them")


def test_a_script_is_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    refused(path, "must hold weights, got a TorchScript program, which is not run")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "must hold a table of tensors, got list"),
        ({"epoch": 3}, r"must hold tensors, or a table of them under state_dict, got \['epoch'\]"),
        ({"state_dict": {}}, "must hold tensors"),
        (torch.zeros(2), "must hold a table of tensors, got Tensor"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "w must be a plain tensor, got torch.sparse_coo"),
        ({"text_model.encoder.layers.0.fc1.weight": torch.zeros(2)}, r"known format = .* a text encoder \(CLIP\)"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2)}, "known format = .*a language model"),
        (OrderedDict(a=torch.zeros(2)), r"known format = .*, got 1 tensors with names such as \['a'\]"),
        (
            state() | {"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 2)},
            "got cross-attention in input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        ),
    ],
    ids=["list", "no tensors", "empty", "tensor", "sparse", "clip", "llm", "unknown", "text to image"],
)
def test_something_else(tree: Any, message: str, file: Path) -> None:
    torch.save(tree, file)
    refused(file, message, {})


def _without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _with(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def _renamed(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("out.0.bias"), "1 tensors missing: out.0.bias"),
        (_with("extra", torch.zeros(1)), "1 unexpected: extra"),
        (_renamed("out.0.bias", "out.0.biass"), r"missing: out.0.bias \(nearest: out.0.biass\), 1 unexpected"),
        (_renamed("time_embed.2.weight", "time_embed.3.weight"), "time_embed.2.weight must be there, got none"),
        (_with("out.0.bias", torch.zeros(33)), r"out.0.bias must be \(32,\), got \(33,\)"),
        (_with("out.0.bias", torch.zeros(32, dtype=torch.int32)), "out.0.bias must be one of float16, .*, got int32"),
        (_with("out.0.bias", torch.tensor(0.0)), r"out.0.bias must be \(32,\), got \(\)"),
        (_with("out.2.weight", torch.zeros(3, 32)), r"must have 4 dimensions .*, got shape \(3, 32\)"),
        (_with("input_blocks.0.0.weight", torch.zeros(0, 3, 3, 3)), "must have 4 dimensions of at least 1"),
        (_without("output_blocks.1.0.in_layers.2.weight"), "output_blocks.1.0.in_layers.2.weight"),
        (_with("output_blocks.9.0.in_layers.0.bias", torch.zeros(1)), "output_blocks must be numbered from 0"),
        (_with("input_blocks.4.0.in_layers.0.bias", torch.zeros(1)), "input_blocks must be 4 for .*, got 5"),
        (_with("output_blocks.0.1.conv.weight", torch.zeros(1)), r"must be 2 or more .*, got \[1, 1, 2\]"),
        (_with("input_blocks.999999.0.in_layers.0.bias", torch.zeros(1)), r"input_blocks .* got 5 without \[4\]"),
        (_with(f"input_blocks.{'9' * 400}.0.in_layers.0.bias", torch.zeros(1)), "1 unexpected: input_blocks.999"),
        (_with("input_blocks.9" + "9" * 5000, torch.zeros(1)), "must be printable, of at most 500 .*, got 5014 char"),
        (_with("out\n\x1b[31m", torch.zeros(1)), r"must be printable, .*, got 9 characters that .* 'out\\n\\x1b\[31m'"),
        (_with("out\udcff", torch.zeros(1)), r"must be printable, .*'out\\udcff'"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change: Callable[[Tensors], object], message: str, file: Path) -> None:
    tensors = state()
    change(tensors)
    torch.save(tensors, file)
    with pytest.raises(IdmFastError, match=message) as caught:
        checkpoints.load(file, SETTINGS)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(value: float, file: Path) -> None:
    tensors = state()
    tensors["out.0.bias"][3] = value
    torch.save(tensors, file)
    with pytest.raises(IdmFastError, match=r"must be finite, got inf or nan in 1 of them \['out.0.bias'\]"):
        checkpoints.load(file, SETTINGS)
    assert main(["convert", str(file), str(file.with_suffix(".safetensors")), "--set", "num_head_channels=32"]) == 2
    assert [entry.name for entry in file.parent.iterdir()] == ["a.pt"]


def test_weights_that_fp16_cannot_hold(file: Path, tmp_path: Path) -> None:
    tensors = state()
    tensors["out.0.bias"][3] = 1e6
    torch.save(tensors, file)
    with pytest.raises(IdmFastError, match=r"must be finite in torch.float16, got inf or nan in \['out_norm.bias'\]"):
        checkpoints.convert(file, tmp_path / "b.safetensors", SETTINGS, dtype="fp16")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_folder_is_of_the_class_that_it_names(file: Path, tmp_path: Path) -> None:
    """Whatever its tensors are called: the rest of its config would be ignored."""
    save_file(state(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    refused(tmp_path, "known format = .*, got a diffusers folder of 'UNet2DConditionModel'")


def test_safetensors_of_other_projects(file: Path) -> None:
    path = file.with_suffix(".safetensors")
    save_file({f"module.{name}": tensor for name, tensor in state().items()}, path, metadata={"license": "MIT"})
    loaded = checkpoints.load(path, SETTINGS)
    assert loaded.license == "MIT"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, "is not a whole safetensors file")
    path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    refused(path, "must be a safetensors file with a header of")
    path.write_bytes(b"PK\x03\x04" + content)
    refused(path, "must be a safetensors file with a header of")


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "must be a weights file or a diffusers folder, got nothing there")
    refused(tmp_path / "none.safetensors", "got nothing there")
    (tmp_path / "text.pt").write_text("hello, this is a text of some length")
    refused(tmp_path / "text.pt", r"must be a torch file \(an archive or a pickle\), .* begin with b'hello, t'")
