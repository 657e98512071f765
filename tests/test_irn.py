"""The identity recovery network: a change of the recognition network that begins as none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from idm_fast import checkpoints
from idm_fast.checkpoints import native
from idm_fast.errors import IdmFastError
from idm_fast.models.irn import Irn, IrnConfig
from idm_fast.models.recognition import Recognition, weight_shapes


@pytest.fixture(scope="module")
def recognition() -> Recognition:
    try:
        return Recognition()
    except IdmFastError as error:
        pytest.skip(str(error))


FACES = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_shapes_are_those_of_the_recognition_network(recognition: Recognition) -> None:
    own = recognition.state_dict() | dict(recognition.named_buffers())
    weights = {name: tuple(tensor.shape) for name, tensor in own.items() if not name.endswith(("bias", "mean"))}
    assert weights == weight_shapes()


def test_it_fits_its_budget() -> None:
    assert sum(parameter.numel() for parameter in Irn().parameters()) == 792_160


def test_untrained_it_is_the_recognition_network(recognition: Recognition) -> None:
    torch.testing.assert_close(Irn()(FACES, recognition), recognition.embed_aligned(FACES))


def test_it_learns_any_embedding_and_leaves_the_recognition_network_alone(recognition: Recognition) -> None:
    torch.manual_seed(0)
    irn, before = Irn(), {name: tensor.clone() for name, tensor in recognition.state_dict().items()}
    own = recognition.embed_aligned(FACES)
    optimizer = torch.optim.Adam(irn.parameters(), 1e-2)
    for _ in range(4):
        loss = (irn(FACES, recognition) - own.flip(0)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    recovered = irn(FACES, recognition)
    apart = (own - own.flip(0)).norm(dim=1)
    assert ((recovered - own.flip(0)).norm(dim=1) < 0.7 * apart).all()
    assert all(parameter.grad is not None for parameter in irn.parameters())
    for name, tensor in recognition.state_dict().items():
        assert torch.equal(tensor, before[name])
    torch.testing.assert_close(recognition.embed_aligned(FACES), own)


def test_it_is_a_model_file_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    irn = Irn(IrnConfig(rank=4))
    native.save(tmp_path / "irn.safetensors", irn, irn.config, {}, torch.float16)
    loaded = checkpoints.load(tmp_path / "irn.safetensors")
    assert loaded.config == irn.config
    assert isinstance(loaded.module, Irn)
    for name, tensor in irn.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor.half().float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank must lie in 1\.\.128, got 0"),
        ({"image_size": 4}, r"image_size must lie in 8\.\.65536, got 4"),
        ({"free_weights": -1}, "free_weights must be >= 0, got -1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        IrnConfig(**settings)
