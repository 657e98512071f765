"""Frozen settings of a VQGAN, and its named presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from idm_fast.config import QkvOrder, check_levels
from idm_fast.errors import IdmFastError

# Far above any real network; they keep a damaged or hostile file from asking for an endless one.
_MOST_LEVELS, _MOST_CHANNELS, _MOST_CODES = 8, 1 << 14, 1 << 22


@dataclass(frozen=True)
class VqganConfig:
    """Shape of one VQGAN. Defaults are those of the public taming and LDM layout; its f4 is the preset ``vq-f4``.

    ``image_size``: side in pixels the network was trained at. ``model_channels`` times ``channel_mult`` is the width of
    each level, finest first; ``stem_channels`` that of the encoder's first convolution, 0 = ``model_channels``.
    ``num_res_blocks``: the encoder's, per level; the decoder has one more. ``attention_levels``: indices of levels with
    attention behind each residual block, 0 = finest; ``middle_attention``: one in the middle. ``unshuffle``: factor of
    the pixel-unshuffle before the stem and of the pixel-shuffle at the end (1 = none). ``z_channels``: what the encoder
    ends with; ``embed_channels``: of a latent and of a code. ``latent_scale``: a latent times this has about unit
    deviation, as a diffusion over latents wants it; encoding and decoding do not apply it.
    """

    image_size: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    stem_channels: int = 0
    in_channels: int = 3
    out_channels: int = 3
    unshuffle: int = 1
    z_channels: int = 3
    embed_channels: int = 3
    codebook_size: int = 8192
    norm_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    latent_scale: float = 1.0
    name: str = "vqgan"

    def __post_init__(self) -> None:
        most = {"codebook_size": _MOST_CODES, "image_size": 1 << 16}
        for name in (
            "image_size", "model_channels", "in_channels", "out_channels", "unshuffle", "z_channels", "embed_channels",
            "codebook_size", "norm_groups",
        ):  # fmt: skip
            value, limit = getattr(self, name), most.get(name, _MOST_CHANNELS)
            if not 1 <= value <= limit:
                raise IdmFastError(f"{name} must lie in 1..{limit}, got {value}")
        if not 0 <= self.stem_channels <= _MOST_CHANNELS:
            raise IdmFastError(f"stem_channels must lie in 0..{_MOST_CHANNELS}, got {self.stem_channels}")
        check_levels(self.channel_mult, self.num_res_blocks, self.attention_levels, _MOST_LEVELS)
        if self.image_size % self.size_multiple:
            raise IdmFastError(f"image_size must be a multiple of {self.size_multiple}, got {self.image_size}")
        if not self.norm_eps > 0 or not 0 <= self.dropout < 1 or not 0 < self.latent_scale < float("inf"):
            raise IdmFastError(
                f"norm_eps and latent_scale must be > 0 and dropout in [0, 1), got {self.norm_eps}, "
                f"{self.latent_scale} and {self.dropout}"
            )

    @property
    def factor(self) -> int:
        """How many pixels of a side become one position of the latent."""
        return int(self.unshuffle * 2 ** (len(self.channel_mult) - 1))

    @property
    def stem_width(self) -> int:
        """Channels behind the encoder's first convolution."""
        return self.stem_channels or self.model_channels

    @property
    def size_multiple(self) -> int:
        """Height and width of a picture must be multiples of this."""
        return self.factor

    # An attention of the family has one head over all channels; a joint projection holds q, k and v in this order.

    @property
    def num_heads(self) -> int:
        return 1

    @property
    def num_head_channels(self) -> int:
        return 0

    @property
    def qkv_order(self) -> QkvOrder:
        return "qkv_heads"

    @property
    def qkv_bias(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


VQGAN_PRESETS: dict[str, VqganConfig] = {
    # LDM's vq-f4: 55.3 M parameters, 64 x 64 codes for a picture of 256.
    "vq-f4": VqganConfig(
        image_size=256, model_channels=128, channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), name="vq-f4"
    ),
    # Ours: the unshuffle leaves the finest level at half the side, where a block costs a quarter, and the middle has no
    # attention, which over 32 x 32 positions would cost as much as four of its convolutions; 2.5 M parameters.
    "vq-face-128": VqganConfig(
        image_size=128, model_channels=64, channel_mult=(1, 2), num_res_blocks=(1, 1), middle_attention=False,
        unshuffle=2, z_channels=4, embed_channels=4, name="vq-face-128",
    ),
}  # fmt: skip


def vqgan_preset(name: str) -> VqganConfig:
    """The preset called ``name``; an unknown name raises ``IdmFastError`` with the list of known ones."""
    if name not in VQGAN_PRESETS:
        raise IdmFastError(f"preset must be one of {sorted(VQGAN_PRESETS)}, got {name!r}")
    return VQGAN_PRESETS[name]
