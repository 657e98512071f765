"""The public formats, and how one is told by the names of its tensors."""

from __future__ import annotations

from idm_fast.checkpoints.diffusers_unet import DIFFUSERS
from idm_fast.checkpoints.diffusers_vqgan import DIFFUSERS_VQGAN
from idm_fast.checkpoints.format import Format
from idm_fast.checkpoints.guided_diffusion import DIFFACE, GUIDED_DIFFUSION
from idm_fast.checkpoints.ldm import LDM
from idm_fast.checkpoints.source import Source
from idm_fast.checkpoints.sr3 import SR3
from idm_fast.checkpoints.swinir import SWINIR
from idm_fast.checkpoints.vqgan import VQGAN
from idm_fast.errors import IdmFastError

# The first that matches is taken: a narrower format stands before a wider one.
FORMATS: dict[str, Format] = {
    made.name: made for made in (DIFFUSERS, LDM, SR3, DIFFACE, GUIDED_DIFFUSION, DIFFUSERS_VQGAN, VQGAN, SWINIR)
}
_FOLDERS = (DIFFUSERS, DIFFUSERS_VQGAN)  # told by the class that config.json names, whatever the tensors are called
_ALIASES = {"ldm-vq": VQGAN.name}  # other words for the same

# Names by which networks of other purposes are known, for the message.
_OTHERS = (
    ("lora_", "low-rank additions to another network (LoRA)"),
    ("text_model.", "a text encoder (CLIP)"),
    ("visual.transformer.", "an image and text encoder (CLIP)"),
    ("vision_model.", "an image encoder (CLIP)"),
    ("model.layers.", "a language model"),
    ("transformer.h.", "a language model (GPT)"),
    ("encoder.layer.", "a language model (BERT)"),
    (".transformer_blocks.", "a network with cross-attention (text to image)"),
    ("double_blocks.", "a diffusion transformer"),
    ("x_embedder.", "a diffusion transformer"),
    ("time_mlp.", "a U-Net of another kind (time_mlp: the ddpm variant of SR3's repository, and others)"),
    ("RDB1.", "an image network (RRDBNet, ESRGAN)"),
    ("layer1.0.conv1.", "an image classifier (ResNet)"),
    ("generator.", "a generative adversarial network"),
)


def choose(source: Source, name: str = "auto") -> Format:
    """The format called ``name``, or the one whose names ``source`` has; ``IdmFastError`` where there is none."""
    name = _ALIASES.get(name, name)
    if name == DIFFUSERS.name and DIFFUSERS_VQGAN.matches(source):
        name = DIFFUSERS_VQGAN.name
    if name != "auto":
        if name not in FORMATS:
            raise IdmFastError(f"format must be auto, {', '.join(FORMATS)}, got {name!r}")
        if not FORMATS[name].matches(source) and name not in _alike(source):
            raise IdmFastError(f"{source.path}: must be of format {name} = {FORMATS[name].title}, got {what(source)}")
        return FORMATS[name]
    found = _matching(source)
    if found is not None:
        return found
    raise IdmFastError(f"{source.path}: must be of a known format = {', '.join(FORMATS)}, got {what(source)}")


def what(source: Source) -> str:
    """What the names of an unknown file look like, for a message."""
    matched = _matching(source)
    if matched is not None:
        return matched.title
    if source.config:
        return f"a diffusers folder of {source.config.get('_class_name')!r:.60}"
    names = list(source.tensors)
    for part, words in _OTHERS:
        if any(part in name for name in names):
            return f"names of {words}: {names[:3]}"
    return f"{len(names)} tensors with names such as {names[:3]}"


def _matching(source: Source) -> Format | None:
    among = _FOLDERS if source.config else FORMATS.values()
    return next((made for made in among if made.matches(source)), None)


def _alike(source: Source) -> tuple[str, ...]:
    """A DifFace file whose levels have all the same number of blocks looks like guided-diffusion's, by intent."""
    return (DIFFACE.name,) if GUIDED_DIFFUSION.matches(source) else ()
