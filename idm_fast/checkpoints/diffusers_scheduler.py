"""``scheduler_config.json`` of diffusers as our noise schedule and solver, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from idm_fast.checkpoints.schedules import from_betas
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.config import DiffusionConfig, Prediction, Variance
from idm_fast.diffusion import Schedule
from idm_fast.errors import IdmFastError

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_VARIANCES: dict[str, Variance] = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large",
    "learned_range": "learned",
}  # fmt: skip
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
# Its own class, and as many evaluations as its pipelines make when nobody asks.
_SOLVERS = {
    "DDPMScheduler": ("ddpm", 1000), "DDIMScheduler": ("ddim", 50), "PNDMScheduler": ("ddim", 50),
    "EulerDiscreteScheduler": ("euler", 50), "HeunDiscreteScheduler": ("heun", 50),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", 50), "DPMSolverSinglestepScheduler": ("dpmpp_2m", 50),
    "UniPCMultistepScheduler": ("dpmpp_2m", 50), "LMSDiscreteScheduler": ("euler", 50),
    "EulerAncestralDiscreteScheduler": ("ddpm", 50), "DEISMultistepScheduler": ("dpmpp_2m", 50),
}  # fmt: skip
_CLASSES = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler",
            "heun": "HeunDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}  # fmt: skip
SCHEDULER_SETTINGS = (
    Setting("beta_schedule", "word", "the noise schedule", "linear", (*_SCHEDULES, "sigmoid")),
    Setting("beta_start", "number", "its first beta", 1e-4),
    Setting("beta_end", "number", "its last beta", 0.02),
    Setting("num_train_timesteps", "whole number", "its entries", 1000),
    Setting("prediction_type", "word", "what the network predicts", "epsilon", tuple(_PREDICTIONS)),
    Setting("variance_type", "word", "of the noise of its ddpm steps", "fixed_small", tuple(_VARIANCES)),
)


def chain(source: Source, settings: Settings) -> tuple[DiffusionConfig, str, int]:
    """(schedule and prediction, our solver, evaluations) of the folder's scheduler, or of what was asked for.

    A solver that we have not is answered by the one of ours that walks the same way. Raises ``IdmFastError`` for a
    scheduler of another kind of diffusion.
    """
    where, c = f"{source.path}: scheduler_config.json", source.scheduler
    name = c.get("_class_name", "DDPMScheduler")
    if name not in _SOLVERS:
        raise IdmFastError(f"{where}: scheduler must be one of {', '.join(_SOLVERS)}, got {name!r:.60}")
    known = {setting.name: setting for setting in SCHEDULER_SETTINGS}
    values = {}
    for key, setting in known.items():
        if c and key not in settings.given:
            told = c.get(key)
            values[key] = setting.typed(where, setting.default if told is None else told)
        else:
            values[key] = settings.ask(key, setting.default)
    sampler, steps = _SOLVERS[name]
    prediction = _PREDICTIONS[values["prediction_type"]]
    diffusion = replace(_diffusion(where, values, c, prediction), variance=_VARIANCES[values["variance_type"]])
    return diffusion, sampler, min(steps, diffusion.train_steps)


def _diffusion(where: str, values: Mapping[str, Any], c: Mapping[str, Any], prediction: Prediction) -> DiffusionConfig:
    n, first, last = values["num_train_timesteps"], values["beta_start"], values["beta_end"]
    given = c.get("trained_betas")
    try:
        if given is not None:
            table = from_betas(where, torch.tensor([float(beta) for beta in given], dtype=torch.float64), prediction)
        elif values["beta_schedule"] == "sigmoid":
            rise = 1 / (1 + np.exp(-np.linspace(-6, 6, DiffusionConfig(train_steps=n).train_steps)))
            table = from_betas(where, torch.from_numpy(rise * (last - first) + first), prediction)
        elif values["beta_schedule"] == "squaredcos_cap_v2":
            table = DiffusionConfig("cosine", prediction, n)
        else:
            schedule: Any = _SCHEDULES[values["beta_schedule"]]
            table = DiffusionConfig(schedule, prediction, n, first, last)
        return _without_signal_at_the_end(table) if c.get("rescale_betas_zero_snr") else table
    except (TypeError, ValueError) as error:
        text = str(error)
        raise IdmFastError(text if text.startswith(where) else f"{where}: {text}") from None


def _without_signal_at_the_end(config: DiffusionConfig) -> DiffusionConfig:
    """sqrt(alpha_bar) shifted and scaled so that it ends at 0 and begins as before (2305.08891, algorithm 1)."""
    table = Schedule.from_config(config).alphas_cumprod
    assert table is not None  # these schedules are discrete
    roots = np.sqrt(table)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    kept = tuple(float(value) for value in roots**2)
    return replace(config, schedule="table", alphas_cumprod=kept)


def written(config: DiffusionConfig, sampler: str, where: str) -> dict[str, Any]:
    """The same as a scheduler's config. Raises ``IdmFastError`` for a diffusion that the library has not."""
    if config.schedule in ("cosine_continuous", "vp_sde") or config.noise_level or config.rescale_timesteps:
        got = "noise levels" if config.noise_level else config.schedule
        raise IdmFastError(f"{where}: a diffusers scheduler must have a table that is walked by index, got {got}")
    made: dict[str, Any] = {
        "_class_name": _CLASSES.get(sampler, "DDIMScheduler"), "num_train_timesteps": config.train_steps,
        "prediction_type": next(word for word, ours in _PREDICTIONS.items() if ours == config.prediction),
        "beta_start": config.beta_start, "beta_end": config.beta_end, "clip_sample": True,
    }  # fmt: skip
    if made["_class_name"] == "DDPMScheduler":
        made["variance_type"] = next(word for word, ours in _VARIANCES.items() if ours == config.variance)
    words = {ours: word for word, ours in _SCHEDULES.items()}
    if config.schedule in words:
        return made | {"beta_schedule": words[config.schedule]}
    table = np.asarray(config.alphas_cumprod)
    return made | {"trained_betas": [float(beta) for beta in 1 - table / np.concatenate([[1.0], table[:-1]])]}
