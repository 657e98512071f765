"""A CLR-Face model of 32-px pictures that costs nothing: what several test modules share."""

from __future__ import annotations

import torch

from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.config_vqgan import VqganConfig
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.irn import IrnConfig

VQGAN = VqganConfig(
    image_size=32, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), middle_attention=False, unshuffle=2,
    z_channels=4, embed_channels=4, norm_groups=4, codebook_size=2048, latent_scale=1.7, name="tiny-vqgan",
)  # fmt: skip
UNET = UNetConfig(
    image_size=8, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), in_channels=4, cond_channels=4,
    out_channels=4, residual=True, norm_groups=4, num_head_channels=16, embed_channels=32,
)  # fmt: skip
PRIOR = ModelConfig("tiny-prior", UNET, DiffusionConfig("cosine_continuous", "x0"), steps=3, latent=True)
CONFIG = ClrFaceConfig("tiny-face", VQGAN, PRIOR, IrnConfig(image_size=32, rank=1, free_weights=0))


def tiny_clr_face(config: ClrFaceConfig = CONFIG, seed: int = 0) -> ClrFace:
    """Every weight counts, and the codes lie where the latents are."""
    torch.manual_seed(seed)
    module = ClrFace(config).eval().requires_grad_(False)
    for part in (module.vqgan, module.prior):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
            else:
                parameter.uniform_(0.5, 1.5)
    module.prior.out_conv.weight.mul_(0.3)
    # Latents of about unit deviation, many codes where they lie, and pictures that are not cut off.
    module.vqgan.to_latent.weight.mul_(0.15)
    module.vqgan.to_latent.bias.zero_()
    module.vqgan.codebook.weight.normal_(0, 0.5)
    module.vqgan.decoder.out_conv.weight.mul_(0.2)
    module.vqgan.decoder.out_conv.bias.zero_()
    return module
