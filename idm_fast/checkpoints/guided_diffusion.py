"""guided-diffusion (openai, also improved-diffusion) and DifFace: one layout of keys, two habits.

They differ in what ``attention_resolutions`` means (a rate of down-sampling; a side in pixels), which the keys show
anyway, and in what the public files were trained with.
"""

from __future__ import annotations

from typing import Any

import torch

from idm_fast.checkpoints.format import Format, Reading, modules_to_names
from idm_fast.checkpoints.guided_keys import Structure, looks_guided, modules, structure
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.config import DiffusionConfig, ModelConfig, Prediction, UNetConfig
from idm_fast.diffusion import respace
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

NETWORK_SETTINGS = (
    Setting("image_size", "whole number", "side in pixels that the network was trained at", 256),
    Setting("num_head_channels", "whole number", "width of one attention head; -1: num_heads says", 64),
    Setting("num_heads", "whole number", "number of attention heads where their width is not fixed", 4),
    Setting("use_new_attention_order", "yes or no", "q, k, v outside the heads (true) or inside (false)", False),
    Setting("qkv_order", "word", "the same in our words", "heads_qkv", ("heads_qkv", "qkv_heads")),
)
DIFFUSION_SETTINGS = (
    Setting("noise_schedule", "word", "the noise schedule it was trained with", "linear", ("linear", "cosine")),
    Setting("diffusion_steps", "whole number", "entries of that schedule", 1000),
    Setting("rescale_timesteps", "yes or no", "the network is told 1000 t / diffusion_steps instead of t", False),
    Setting("predict_xstart", "yes or no", "the network predicts the clean image instead of the noise", False),
    Setting("sigma_small", "yes or no", "without a learned variance: the smaller of the two fixed ones", False),
    Setting("timestep_respacing", "anything", "steps of the respaced chain: 250, ddim250 or 10,15,20", 250),
)
INFERRED = (
    Setting("super_res", "yes or no", "half of the input channels are a smaller picture, enlarged", inferred=True),
    Setting("in_channels", "whole number", "channels of the image", inferred=True),
    Setting("out_channels", "whole number", "6 with a learned variance, else 3", inferred=True),
    Setting("model_channels", "whole number", "width of the finest level", inferred=True),
    Setting("num_channels", "whole number", "the same in the words of its flags", inferred=True),
    Setting("num_res_blocks", "list of whole numbers", "per level, or one for all", inferred=True),
    Setting("channel_mult", "list of whole numbers", "width of each level", inferred=True),
    Setting("attention_resolutions", "list of whole numbers", "where attention sits", inferred=True),
    Setting("use_scale_shift_norm", "yes or no", "the time scales and shifts", inferred=True),
    Setting("resblock_updown", "yes or no", "blocks change the resolution", inferred=True),
    Setting("conv_resample", "yes or no", "convolutions change the resolution", inferred=True),
    Setting("learn_sigma", "yes or no", "half of the output channels are a variance", inferred=True),
    Setting("class_cond", "yes or no", "classes are given", inferred=True),
)
ASIDE = frozenset({"format", "dims", "dropout", "use_checkpoint", "use_fp16", "num_heads_upsample"})


def network_fields(settings: Settings, found: Structure, *, image_size: int, head_channels: int = 64) -> dict[str, Any]:
    """The fields of ``UNetConfig`` that had to be asked for, beside those that the shapes tell.

    ``image_size`` and ``head_channels``: the family's habit, taken where nothing is given.
    """
    side = settings.ask("image_size", image_size)
    order = "qkv_heads" if settings.ask("use_new_attention_order", False) else "heads_qkv"
    if "qkv_order" in settings.given:
        order = settings.given["qkv_order"]
        settings.assumed.pop("use_new_attention_order", None)
    return {
        **found.fields,
        "image_size": side,
        "qkv_order": order,
        **_heads(settings, found.attention_widths, head_channels),
    }


def _heads(settings: Settings, widths: tuple[int, ...], usual: int) -> dict[str, int]:
    """By width where that was given or divides every attention, else by number."""
    width = settings.given.get("num_head_channels", 0)
    if width < 0 or (width == 0 and "num_heads" in settings.given):
        return {"num_heads": settings.ask("num_heads", 4)}
    if width > 0:
        return {"num_head_channels": width}
    if width == 0 and all(channels % usual == 0 for channels in widths):
        return {"num_head_channels": settings.ask("num_head_channels", usual)}
    settings.require(
        "num_head_channels",
        "the keys do not tell it (nor num_heads, which may be given instead), and the usual "
        f"{usual} does not divide attentions of {sorted(set(widths))} channels",
    )
    return {"num_heads": 1}


def diffusion(settings: Settings, learned: bool, respacing: str) -> tuple[DiffusionConfig, int, str]:
    """The schedule and what is predicted, and the family's own chain: its evaluations and which steps it keeps.

    ``learned``: half of the output channels are a variance. ``respacing``: of the family's public chain.
    """
    prediction: Prediction = "x0" if settings.ask("predict_xstart", False) else "eps"
    made = DiffusionConfig(
        schedule=settings.ask("noise_schedule", "linear"),
        prediction=prediction,
        train_steps=(train := settings.ask("diffusion_steps", 1000)),
        beta_start=1e-4 * (scale := 1000 / max(1, train)),  # fewer steps reach the same noise
        beta_end=0.02 * scale,
        rescale_timesteps=settings.ask("rescale_timesteps", False),
        variance="learned" if learned else "small" if settings.ask("sigma_small", False) else "large",
    )
    asked = settings.ask("timestep_respacing", respacing if train >= 250 else "")
    if asked in ("", None):
        return made, train, ""
    words = ",".join(map(str, asked)) if isinstance(asked, list) else str(asked)
    try:
        return made, len(respace(train, words)), words
    except IdmFastError as error:
        raise IdmFastError(f"{settings.where}: setting timestep_respacing: {error}") from None


def _read(source: Source, settings: Settings, difface: bool, averaged: bool | None) -> Reading:
    tensors = source.averaged if averaged is not False and source.averaged else source.tensors
    where = str(source.path)
    found = structure(where, tensors)
    channels = 3 if found.in_channels == 6 else found.in_channels
    fields = network_fields(settings, found, image_size=512 if difface else 256)
    if channels != found.in_channels:
        fields |= {"cond_channels": found.in_channels - channels, "cond_resize": "bilinear"}
    unet = _config(where, {**fields, "in_channels": channels})
    agree(settings, unet)
    learned = unet.out_channels == 2 * unet.in_channels
    made, steps, respacing = diffusion(settings, learned, "ddim250" if difface else "250")
    config = ModelConfig(source.path.stem, unet, made, "ddpm", steps, respacing=respacing)
    with torch.device("meta"):
        module = UNet(unet)
    picked = None if source.averaged is None else tensors is source.averaged
    return Reading(config, module, modules_to_names(module, modules(module)), tensors, averaged=picked)


def _config(where: str, fields: dict[str, Any]) -> UNetConfig:
    try:
        return UNetConfig(**fields)
    except IdmFastError as error:
        raise IdmFastError(f"{where}: {error}") from None


def agree(settings: Settings, unet: UNetConfig) -> None:
    """What was given beside must be what the tensors say.

    ``attention_resolutions`` are rates of down-sampling in the network's own arguments and in LDM, and sides in pixels
    in guided-diffusion's flags and in DifFace: either will do.
    """
    blocks = list(unet.num_res_blocks)
    given = settings.given.get("num_res_blocks", blocks)
    settings.agree("num_res_blocks", blocks[:1] if len(given) == 1 and len(set(blocks)) == 1 else blocks)
    settings.agree("super_res", unet.cond_channels > 0)
    if settings.given.get("in_channels") != unet.in_channels + unet.cond_channels:
        settings.agree("in_channels", unet.in_channels)
    settings.agree("out_channels", unet.out_channels)
    settings.agree("use_scale_shift_norm", unet.use_scale_shift_norm)
    settings.agree("resblock_updown", unet.resample == "resblock")
    if unet.resample == "conv":
        settings.agree("conv_resample", True)
    settings.agree("learn_sigma", unet.out_channels == 2 * unet.in_channels)
    settings.agree("class_cond", unet.num_classes > 0)
    if not unet.time_channels:  # else its first multiplier is a fraction
        settings.agree("model_channels", unet.model_channels)
        settings.agree("num_channels", unet.model_channels)
        settings.agree("channel_mult", list(unet.channel_mult))
    _agree_attention(settings, unet)


def _agree_attention(settings: Settings, unet: UNetConfig) -> None:
    asked = set(settings.given.get("attention_resolutions", ()))
    rates = [2**level for level in range(len(unet.channel_mult))]
    sides = [unet.image_size // rate for rate in rates]
    meant = [[each[level] for level in unet.attention_levels] for each in (rates, sides)]
    if "attention_resolutions" in settings.given and not any(
        asked & set(each) == set(found) for each, found in zip((rates, sides), meant, strict=True)
    ):
        settings.agree("attention_resolutions", meant[0])


def _uneven(source: Source) -> bool:
    """DifFace gives every level its own number of blocks, and saves ``{"state_dict": {"module...."}}``."""
    try:
        blocks = structure(str(source.path), source.tensors).fields["num_res_blocks"]
    except IdmFastError:
        return False
    return len(set(blocks)) > 1


GUIDED_DIFFUSION = Format(
    "guided-diffusion",
    "U-Net of guided-diffusion or improved-diffusion",
    lambda source: looks_guided(source.tensors),
    lambda source, settings, averaged: _read(source, settings, False, averaged),
    (*NETWORK_SETTINGS, *DIFFUSION_SETTINGS, *INFERRED),
    ASIDE,
)
DIFFACE = Format(
    "difface",
    "U-Net of DifFace",
    lambda source: looks_guided(source.tensors) and _uneven(source),
    lambda source, settings, averaged: _read(source, settings, True, averaged),
    (*NETWORK_SETTINGS, *DIFFUSION_SETTINGS, *INFERRED),
    ASIDE,
)
