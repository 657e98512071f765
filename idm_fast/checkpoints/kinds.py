"""What a model file may hold: each kind of network with its settings and how it is laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from idm_fast.config import ModelConfig
from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.config_vqgan import VqganConfig
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.irn import Irn, IrnConfig
from idm_fast.models.swinir import SwinIR, SwinIRConfig
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan


@dataclass(frozen=True)
class Kind:
    """``name``: the word in a file's header. ``config``: the class of its settings. ``build``: settings -> module."""

    name: str
    config: type[Any]
    build: Callable[[Any], nn.Module]


UNET = Kind("unet", ModelConfig, lambda config: UNet(config.unet))
VQGAN = Kind("vqgan", VqganConfig, Vqgan)
SWINIR = Kind("swinir", SwinIRConfig, SwinIR)
IRN = Kind("irn", IrnConfig, Irn)
CLR_FACE = Kind("clr_face", ClrFaceConfig, ClrFace)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (UNET, VQGAN, SWINIR, IRN, CLR_FACE)}


def kind_of(config: object) -> Kind:
    """The kind whose settings ``config`` are."""
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))
