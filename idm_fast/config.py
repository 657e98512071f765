"""Frozen settings of a network and of its diffusion, and the named presets.

A preset says everything that a checkpoint's tensors cannot say. ``from_dict`` refuses unknown keys, so that a
misspelt or newer setting is never silently ignored.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from idm_fast.errors import IdmFastError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConcatOrder = Literal["x_cond", "cond_x"]
EmbeddingOrder = Literal["cos_sin", "sin_cos"]
QkvOrder = Literal["qkv_heads", "heads_qkv"]
Resample = Literal["conv", "resblock"]
MiddleAttention = Literal["norm", "no_norm", "none"]
CondResize = Literal["none", "bilinear"]
Spacing = Literal["trailing", "leading", "linspace", "uniform", "angle"]
Prediction = Literal["eps", "v", "x0"]
Variance = Literal["small", "large", "learned"]

# Far above any real network; they keep a damaged or hostile file from asking for an endless one.
_MOST_LEVELS, _MOST_BLOCKS, _MOST_MULT, _MOST_TRAIN_STEPS, _LARGEST_SIDE = 10, 64, 1 << 14, 1_000_000, 1 << 16


def _at_least(config: object, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise IdmFastError(f"{name} must be >= {least}, got {getattr(config, name)}")


def check_levels(
    channel_mult: tuple[int, ...], num_res_blocks: tuple[int, ...], attention_levels: tuple[int, ...], most: int
) -> None:
    """Raises ``IdmFastError`` unless the three describe the same 1 to ``most`` levels of a network."""
    levels = len(channel_mult)
    if not 1 <= levels <= most or not all(1 <= mult <= _MOST_MULT for mult in channel_mult):
        raise IdmFastError(
            f"channel_mult must be 1 to {most} whole numbers from 1 up to {_MOST_MULT}, got {list(channel_mult)}"
        )
    if len(num_res_blocks) != levels or not all(1 <= n <= _MOST_BLOCKS for n in num_res_blocks):
        raise IdmFastError(
            f"num_res_blocks must have one entry in 1..{_MOST_BLOCKS} per level of channel_mult = {levels} "
            f"entries, got {list(num_res_blocks)}"
        )
    if wrong := [level for level in attention_levels if not 0 <= level < levels]:
        raise IdmFastError(f"attention_levels must lie in 0..{levels - 1}, got {wrong}")


@dataclass(frozen=True)
class UNetConfig:
    """Shape of one U-Net. Defaults are those of guided-diffusion.

    ``image_size``: side in pixels the network was trained at. ``unshuffle``: factor of the pixel-unshuffle stem
    (1 = none). ``channel_mult``, ``num_res_blocks``: per level, finest first. ``attention_levels``: indices of levels
    with attention after each residual block, 0 = finest. ``num_head_channels``: width of one attention head, or 0 to
    use ``num_heads``. ``time_channels``: width of the sinusoid, 0 = that of the stem; ``embed_channels``: width of the
    time embedding, 0 = 4 x the sinusoid. ``residual``: the output is added to the condition (the network then predicts
    the change to make). ``cond_resize``: what is done to a condition of another size than x (super-resolution).

    Of diffusers: ``freq_shift`` f makes the sinusoid's frequencies 10000^(-i / (half - f)); ``downsample_padding`` 0
    pads below and to the right only; ``middle_attention``: of the middle, with its own norm, without, or none at all;
    ``middle_scale`` divides what the middle's blocks and attention give; ``center_input`` maps x to 2 x - 1.
    """

    image_size: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    attention_levels: tuple[int, ...] = ()
    in_channels: int = 3
    cond_channels: int = 0
    out_channels: int = 3
    concat_order: ConcatOrder = "x_cond"
    unshuffle: int = 1
    residual: bool = False
    num_heads: int = 1
    num_head_channels: int = 0
    qkv_order: QkvOrder = "qkv_heads"
    qkv_bias: bool = True
    embedding_order: EmbeddingOrder = "cos_sin"
    embed_channels: int = 0
    embed_silu: bool = True
    use_scale_shift_norm: bool = True
    resample: Resample = "conv"
    norm_groups: int = 32
    norm_eps: float = 1e-5
    num_classes: int = 0
    dropout: float = 0.0
    cond_resize: CondResize = "none"
    time_channels: int = 0
    freq_shift: float = 0.0
    downsample_padding: int = 1
    middle_attention: MiddleAttention = "norm"
    middle_scale: float = 1.0
    center_input: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "model_channels", "in_channels", "out_channels", "unshuffle", "num_heads"):
            _at_least(self, name, 1)
        for name in ("cond_channels", "num_head_channels", "embed_channels", "num_classes", "time_channels"):
            _at_least(self, name, 0)
        _at_least(self, "norm_groups", 1)
        check_levels(self.channel_mult, self.num_res_blocks, self.attention_levels, _MOST_LEVELS)
        if self.time_width % 2 or self.time_width <= 2 * self.freq_shift:
            name = "time_channels" if self.time_channels else "model_channels"
            raise IdmFastError(
                f"{name} must be even (half cosines, half sines) and above 2 freq_shift = {2 * self.freq_shift:g}, "
                f"got {self.time_width}"
            )
        if self.downsample_padding not in (0, 1):
            raise IdmFastError(f"downsample_padding must be 0 or 1, got {self.downsample_padding}")
        if not self.middle_scale > 0:
            raise IdmFastError(f"middle_scale must be > 0, got {self.middle_scale}")
        if self.image_size % self.size_multiple:
            raise IdmFastError(f"image_size must be a multiple of {self.size_multiple}, got {self.image_size}")
        if self.image_size > _LARGEST_SIDE:
            raise IdmFastError(f"image_size must be <= {_LARGEST_SIDE}, got {self.image_size}")
        if self.residual and self.cond_channels != self.out_channels:
            raise IdmFastError(
                f"residual needs cond_channels = out_channels = {self.out_channels}, got {self.cond_channels}"
            )
        if not self.norm_eps > 0 or not 0 <= self.dropout < 1:
            raise IdmFastError(
                f"norm_eps must be > 0 and dropout in [0, 1), got norm_eps {self.norm_eps}, dropout {self.dropout}"
            )

    @property
    def size_multiple(self) -> int:
        """Height and width of an input must be multiples of this."""
        return int(self.unshuffle * 2 ** (len(self.channel_mult) - 1))

    @property
    def turned(self) -> bool:
        """Whether its down-sampling pads below and to the right: a plan runs it on images turned by 180 degrees."""
        return self.downsample_padding == 0 and self.resample == "conv" and len(self.channel_mult) > 1

    @property
    def stem_width(self) -> int:
        """Channels of the first convolution and of the last norm."""
        return self.model_channels * self.channel_mult[0]

    @property
    def time_width(self) -> int:
        """Channels of the sinusoid."""
        return self.time_channels or self.stem_width

    @property
    def embed_width(self) -> int:
        return self.embed_channels or 4 * self.time_width


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule a network was trained with, and what it predicts.

    ``schedule``: continuous, ``cosine_continuous`` (alpha = cos(pi t / 2)) or ``vp_sde`` (beta linear in t from
    ``beta_start`` to ``beta_end``; the score SDE's are 0.1 and 20); or discrete with ``train_steps`` entries:
    ``linear`` or ``scaled_linear`` (``beta_start``, ``beta_end``), ``cosine``, or the ``table`` of ``alphas_cumprod``.
    ``noise_level``: the network is conditioned on sqrt(alpha_bar) as in SR3 instead of on the time;
    ``rescale_timesteps``: on 1000 index / ``train_steps`` instead of the index (guided-diffusion).
    ``variance``: of the ddpm solver's noise (``diffusion/samplers/ddpm.py``).
    """

    schedule: Literal["cosine_continuous", "vp_sde", "linear", "scaled_linear", "cosine", "table"] = "linear"
    prediction: Prediction = "eps"
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    noise_level: bool = False
    rescale_timesteps: bool = False
    alphas_cumprod: tuple[float, ...] = ()
    variance: Variance = "small"

    def __post_init__(self) -> None:
        _at_least(self, "train_steps", 1)
        if self.train_steps > _MOST_TRAIN_STEPS:
            raise IdmFastError(f"train_steps must be <= {_MOST_TRAIN_STEPS}, got {self.train_steps}")
        entries = self.train_steps if self.schedule == "table" else 0
        if len(self.alphas_cumprod) != entries:
            raise IdmFastError(
                f"alphas_cumprod must have {entries} entries for schedule {self.schedule}, "
                f"got {len(self.alphas_cumprod)}"
            )
        limit = math.inf if self.schedule == "vp_sde" else 1
        if not 0 < self.beta_start <= self.beta_end < limit:
            raise IdmFastError(
                f"betas must satisfy 0 < beta_start <= beta_end < {limit}, got {self.beta_start} and {self.beta_end}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A network, its diffusion, and the sampling settings it is at its best with.

    ``respacing``: the training steps that its published chain keeps, in guided-diffusion's notation ("ddim250", "250",
    "10,15,20"); it takes the place of ``steps``. ``low_res``: side in pixels to which a super-resolution network's
    condition is reduced before it is enlarged; 0: the crop is shown as it is, or reduced to a quarter where the network
    itself enlarges it. ``latent``: the network works on the latents of an autoencoder and not on pictures.
    ``spacing``: of the times that are walked (``diffusion/spacing.py``).
    """

    name: str
    unet: UNetConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: str = "ddim"
    steps: int = 50
    strength: float = 1.0
    respacing: str = ""
    low_res: int = 0
    latent: bool = False
    spacing: Spacing = "trailing"

    def __post_init__(self) -> None:
        _at_least(self, "steps", 1)
        _at_least(self, "low_res", 0)
        if not 0 < self.strength <= 1:
            raise IdmFastError(f"strength must lie in (0, 1], got {self.strength}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Config = TypeVar("Config", bound="DataclassInstance")


def from_dict(cls: type[Config], values: Any, where: str = "config") -> Config:
    """Builds ``cls`` from plain values (as JSON gives them); ``where`` names their origin in errors.

    Raises ``IdmFastError`` naming any unknown or missing key, a value of another type, or one that is not allowed.
    """
    if not isinstance(values, dict):
        raise IdmFastError(f"{where}: must hold a table of {cls.__name__} keys, got {_shown(values)}")
    known = {item.name for item in fields(cls)}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise IdmFastError(f"{where}: unknown {cls.__name__} keys {unknown}; known are {sorted(known)}")
    hints = get_type_hints(cls)
    made = {key: _typed(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**made)
    except TypeError as error:  # a key without a default is missing
        raise IdmFastError(f"{where}: {error}") from None
    except IdmFastError as error:
        raise IdmFastError(f"{where}: {error}") from None


def _typed(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the type ``hint`` of a field asks; JSON's lists become tuples and its whole numbers floats."""
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, name)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise IdmFastError(f"{name} must be one of {get_args(hint)}, got {_shown(value)}")
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(get_args(hint)[0], item, name) for item in value)
    if hint is float and (whole or (isinstance(value, float) and math.isfinite(value))):
        return float(value)
    if (hint is int and whole) or (hint in (bool, str) and isinstance(value, hint)):
        return value
    wanted = hint.__name__
    if get_origin(hint) is tuple:
        wanted = "a list of whole numbers" if get_args(hint)[0] is int else "a list of numbers"
    raise IdmFastError(f"{name} must be {wanted}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


_OURS = DiffusionConfig(schedule="cosine_continuous", prediction="x0")


def _idm(image_size: int, unshuffle: int) -> UNetConfig:
    # Multiples of 64 channels and one attention, in the middle: few distinct shapes, all friendly to matrix units. 128
    # and 256 px run the same inner network at 64 x 64 and below, so a larger picture costs no more; 64 px, for
    # experiments, at 32 x 32: a quarter of the work. 7.6 M parameters keep the fp16 file under 16 MB.
    return UNetConfig(
        image_size=image_size, model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=(1, 2, 1),
        cond_channels=3, unshuffle=unshuffle, residual=True, num_head_channels=64,
        embed_channels=128,
    )  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    "idm-64": ModelConfig("idm-64", _idm(64, 2), _OURS),
    "idm-128": ModelConfig("idm-128", _idm(128, 2), _OURS),
    "idm-256": ModelConfig("idm-256", _idm(256, 4), _OURS),
    # A generator, for experiments: 16 x 16 positions inside, so that minutes on a CPU show it its data many times.
    "gen-64": ModelConfig(
        "gen-64",
        UNetConfig(
            image_size=64, model_channels=64, channel_mult=(1, 2), num_res_blocks=(1, 2), unshuffle=4,
            num_head_channels=64, embed_channels=128, norm_groups=8,
        ),
        _OURS, "ddpm", 25,
    ),
    # CLR-Face's prior, on latents of 32 x 32: 2.8 GFLOP and 3.6 M parameters, so that with the autoencoder around it
    # (7.7 GFLOP, both ways) one evaluation costs less than one of idm-128, and all of CLR-Face fits into 16 MB.
    "clr-prior-128": ModelConfig(
        "clr-prior-128",
        UNetConfig(
            image_size=32, model_channels=64, channel_mult=(1, 2), num_res_blocks=(2, 2), in_channels=4,
            cond_channels=4, out_channels=4, residual=True, num_head_channels=64, embed_channels=128,
        ),
        DiffusionConfig(schedule="vp_sde", prediction="x0", beta_start=0.1, beta_end=20.0), steps=1, latent=True,
        spacing="angle",
    ),
    "sr3-128": ModelConfig(
        "sr3-128",
        UNetConfig(
            image_size=128, model_channels=64, channel_mult=(1, 2, 4, 8, 8), num_res_blocks=(2,) * 5,
            attention_levels=(3,), cond_channels=3, concat_order="cond_x", embedding_order="sin_cos",
            embed_channels=64, embed_silu=False, use_scale_shift_norm=False, qkv_order="heads_qkv", qkv_bias=False,
        ),
        DiffusionConfig(train_steps=2000, beta_start=1e-6, beta_end=1e-2, noise_level=True), "ddpm", 2000,
    ),
    "sr3-512": ModelConfig(
        "sr3-512",
        UNetConfig(
            image_size=512, model_channels=64, channel_mult=(1, 2, 4, 8, 16), num_res_blocks=(1,) * 5,
            cond_channels=3, concat_order="cond_x", embedding_order="sin_cos", embed_channels=64, embed_silu=False,
            use_scale_shift_norm=False, qkv_order="heads_qkv", qkv_bias=False, norm_groups=16,
        ),
        DiffusionConfig(train_steps=2000, beta_start=1e-6, beta_end=1e-2, noise_level=True), "ddpm", 2000,
    ),
    "gd-256": ModelConfig(
        "gd-256",
        UNetConfig(
            image_size=256, model_channels=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=(2,) * 6,
            attention_levels=(3, 4, 5), out_channels=6, num_head_channels=64, qkv_order="heads_qkv",
            resample="resblock",
        ),
        DiffusionConfig(), "ddpm", 250,
    ),
    "difface-512": ModelConfig(
        "difface-512",
        UNetConfig(
            image_size=512, model_channels=32, channel_mult=(1, 2, 4, 8, 8, 16, 16),
            num_res_blocks=(1, 2, 2, 2, 2, 3, 4), attention_levels=(4, 5, 6), out_channels=6, num_head_channels=64,
            qkv_order="heads_qkv",
        ),
        DiffusionConfig(), "ddpm", 250,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset called ``name``; an unknown name raises ``IdmFastError`` with the list of known ones."""
    if name not in PRESETS:
        raise IdmFastError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
