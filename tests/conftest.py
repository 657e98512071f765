"""Settings of the whole test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton reads this when it decorates a kernel, so it must be set before anything imports triton. On a machine with a
# CUDA device the kernels run there instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test pictures that lies beside the checkout; a test that needs it skips where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the test pictures in ../shared/data, which are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a 32-px restorer that has learnt nothing and is fast: for what is not about the result."""
    # Imported here: they import triton, which must see the variable above.
    from idm_fast.checkpoints import native
    from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
    from idm_fast.models.unet import UNet

    unet = UNetConfig(
        image_size=32, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, unshuffle=2,
        residual=True, norm_groups=4, num_head_channels=16, embed_channels=32,
    )  # fmt: skip
    config = ModelConfig("tiny", unet, DiffusionConfig("cosine_continuous", "x0"), steps=3)
    torch.manual_seed(0)
    module = UNet(unet)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
        module.out_conv.weight.mul_(0.3)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    native.save(path, module, config, {}, torch.float32)
    return path
