"""Back ends by measurement: kept, used again, and refused where they are of another machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from idm_fast.config import UNetConfig, preset
from idm_fast.diffusion import Schedule, build_table, initial_noise
from idm_fast.engine import Engine, EngineOptions, autotune
from idm_fast.engine.autotune import Policy
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

pytest.importorskip("idm_fast._C", reason="without the native module there is nothing to choose from")

CONFIG = UNetConfig(
    image_size=16, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, norm_groups=4,
    unshuffle=2, residual=True, num_head_channels=16, embed_channels=32,
)  # fmt: skip
DIFFUSION = preset("idm-128").diffusion
TABLE = build_table(Schedule.from_config(DIFFUSION), DIFFUSION.prediction, "ddim", 2)


@pytest.fixture(scope="module")
def module() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG)


def _engine(module: UNet, path: Path, policy: Policy, backend: str | None = None) -> Engine:
    options = EngineOptions(backend=backend, autotune=policy, cache=path)
    return Engine.compile(module, (1, 16, 16), TABLE, dtype="fp32", options=options)


def _backends(engine: Engine) -> list[str]:
    return [node.backend for node in engine.nodes]


def _timed_as(monkeypatch: pytest.MonkeyPatch, best: str) -> list[str]:
    """The measurement finds ``best`` wherever it is a candidate. Returns the operations that were measured."""
    seen: list[str] = []

    def fastest(op: str, device: torch.device, candidates: list[str], arguments: tuple[object, ...]) -> str:
        seen.append(op)
        return best if best in candidates else candidates[0]

    monkeypatch.setattr(autotune, "fastest", fastest)
    return seen


def test_what_was_measured_is_kept_and_used(module: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "autotune.json"
    seen = _timed_as(monkeypatch, "torch")
    tuned = _engine(module, path, "on")
    assert "conv2d" in seen
    assert {node.backend for node in tuned.nodes if node.op == "conv2d"} == {"torch"}
    assert json.loads(path.read_text())["machine"] == autotune.machine()
    count = len(seen)
    assert _backends(_engine(module, path, "cached")) == _backends(tuned)
    assert _backends(_engine(module, path, "on")) == _backends(tuned)
    assert len(seen) == count  # nothing was left to measure
    first = _engine(module, path, "off")
    assert {node.backend for node in first.nodes if node.op == "conv2d"} == {"cpu"}
    # What is forced outranks what was measured.
    forced = _engine(module, path, "cached", backend="cpu")
    assert {node.backend for node in forced.nodes if node.op == "conv2d"} == {"cpu"}
    seeds = torch.tensor([1])
    inputs = (initial_noise(seeds, (1, 3, 16, 16), "cpu"), seeds, torch.zeros(1, 3, 16, 16))
    assert (tuned.run(*inputs) - first.run(*inputs)).abs().max() < 1e-4


def test_a_measurement(module: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(autotune, "ROUNDS", 1)
    engine = _engine(module, tmp_path / "autotune.json", "on")
    assert set(_backends(engine)) <= {"cpu", "torch"}
    again = _engine(module, tmp_path / "autotune.json", "cached")
    assert _backends(again) == _backends(engine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"machine": {"cpu": "another"}, "choices": {}}', "must be of this machine: cpu = .*, got another"),
        ("not json", "must be a cache of choices"),
        ("[1]", "must be a cache of choices"),
    ],
)
def test_another_machine_s_file_is_refused(
    module: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    path = tmp_path / "autotune.json"
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=message):
        engine = _engine(module, path, "cached")
    assert set(_backends(engine)) == {"cpu"}
    _timed_as(monkeypatch, "torch")
    with pytest.warns(RuntimeWarning, match=message):
        _engine(module, path, "on")
    assert json.loads(path.read_text())["machine"] == autotune.machine()


def test_an_unknown_policy_is_refused(module: UNet, tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="autotune must be one of off, cached, on, got 'maybe'"):
        _engine(module, tmp_path / "a.json", "maybe")  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_nothing_behind(
    module: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "autotune.json"
    path.mkdir()
    _timed_as(monkeypatch, "torch")
    with pytest.warns(RuntimeWarning, match="must be"):
        _engine(module, path, "on")
    assert list(tmp_path.iterdir()) == [path]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert autotune.default_path().name == "autotune.json"


def test_a_folder_that_cannot_be_written_is_said(module: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    _timed_as(monkeypatch, "torch")
    with pytest.warns(RuntimeWarning, match="must be"):
        _engine(module, tmp_path / "file" / "autotune.json", "on")
