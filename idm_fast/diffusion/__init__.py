"""Diffusion: schedules, what the network predicts, solvers as coefficient tables, and the one sampling loop.

schedule.py          alpha_t, sigma_t, log SNR, what the network is told about the time
spacing.py           which times a sampler visits, respaced chains
parameterisation.py  eps | v | x0
samplers/            one file a solver, and ``build_table``
table.py             SamplerTable: all a run needs, known before it starts
guidance.py          the estimate moved against a gradient, between the steps
loop.py              sample: network, fused update, network, fused update, ...
"""

from idm_fast.diffusion.guidance import Guidance, gradient_of, low_frequencies
from idm_fast.diffusion.loop import initial_noise, noised_start, sample
from idm_fast.diffusion.parameterisation import PARAMETERISATIONS, Parameterisation
from idm_fast.diffusion.samplers import CORRECTOR_SNR, SOLVERS, VARIANCES, Variance, build_table
from idm_fast.diffusion.schedule import Schedule
from idm_fast.diffusion.spacing import SPACINGS, Spacing, respace
from idm_fast.diffusion.table import SamplerTable

__all__ = [
    "CORRECTOR_SNR",
    "PARAMETERISATIONS",
    "SOLVERS",
    "SPACINGS",
    "VARIANCES",
    "Guidance",
    "Parameterisation",
    "SamplerTable",
    "Schedule",
    "Spacing",
    "Variance",
    "build_table",
    "gradient_of",
    "initial_noise",
    "low_frequencies",
    "noised_start",
    "respace",
    "sample",
]
