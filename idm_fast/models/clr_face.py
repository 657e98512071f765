"""CLR-Face as one network: autoencoder, prior over its latents, identity recovery network and latent mask.

Source: "CLR-Face" (arXiv 2402.06106). The parts are trained one after another and only kept together here; who walks
them is ``idm_fast.clr_face``. The recognition network of the guidance is no part of it: it comes from its own package.
"""

from __future__ import annotations

from torch import Tensor, nn

from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.irn import Irn
from idm_fast.models.latent_mask import LatentMask
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan


class ClrFace(nn.Module):
    """``encode`` and ``decode`` are the autoencoder's, of latents in the prior's unit: about unit deviation.

    Both take any float type and give float32. The codes are searched in float32, whatever the weights' type.
    """

    def __init__(self, config: ClrFaceConfig) -> None:
        super().__init__()
        self.config = config
        side = config.latent_size
        self.vqgan = Vqgan(config.vqgan)
        self.prior = UNet(config.prior.unet)
        self.irn = Irn(config.irn)
        self.mask = LatentMask(config.vqgan.embed_channels, side, side)

    def encode(self, x: Tensor) -> Tensor:
        """The scaled latent [N, D, h, w] of pictures [N, 3, S, S] in [-1, 1], not quantised."""
        return self.vqgan.encode(x.to(self.vqgan.from_latent.weight.dtype)).float() * self.config.vqgan.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        """The pictures of scaled latents, which it quantises; one of NaN where a latent is not finite, which is near no
        code. Raises ``IdmFastError`` for a latent of another size."""
        side = self.config.latent_size
        expected = [self.config.vqgan.embed_channels, side, side]
        if latent.ndim != 4 or list(latent.shape[1:]) != expected:
            raise IdmFastError(f"ClrFace: latent must be [N, {str(expected)[1:]}, got {list(latent.shape)}")
        codes, _ = self.vqgan.quantize(latent.float() / self.config.vqgan.latent_scale)
        picture = self.vqgan.decode(codes.to(self.vqgan.from_latent.weight.dtype), quantize=False).float()
        return picture + (0 * latent.float()).sum((1, 2, 3), keepdim=True)
