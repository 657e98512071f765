"""How a Triton convolution is cut: tile sizes, warps, stages and splits, chosen by shape or given by an autotuner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

MULTIPROCESSORS = 132  # where no device is asked (the interpreter)
LEAST_STEPS = 8  # of K that a split keeps: fewer would not pay for its second pass
MAX_SPLITS = 32


class Problem(NamedTuple):
    """What a choice depends on. ``k``: length of the sum, taps x channels of convolution and shortcut together."""

    samples: int
    phases: int  # 4 with upsample, else 1
    positions: int  # output positions of one phase of one sample
    cout: int
    k: int
    item: int  # bytes of an element
    norm: bool  # with a prologue
    aligned: bool = True  # all channels are multiples of 16: loads are 16 bytes wide


@dataclass(frozen=True)
class Config:
    """One program makes ``m`` positions x ``n`` channels, ``k`` channels of one tap at a time.

    ``splits``: programs that share one sum; above 1, a second kernel adds their parts in order.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1


# From the largest tile to the smallest. 16-bit: 128 x 128 is what a pair of warpgroups of sm_90 likes, 64 x 64 fills
# a device at low resolutions; 64 channels a step make the larger tiles spill registers when everything is fused.
# float32 runs without tensor cores: small tiles keep the operands in registers.
HALF = (
    Config(128, 128, 32, 8, 4),
    Config(128, 64, 32, 4, 4),
    Config(64, 128, 32, 4, 4),
    Config(64, 64, 32, 4, 4),
    Config(128, 32, 32, 4, 4),
    Config(128, 16, 32, 4, 4),
    Config(32, 64, 64, 4, 4),
)
FLOAT = (Config(64, 64, 16, 4, 2), Config(64, 32, 16, 4, 2), Config(32, 32, 16, 4, 2), Config(64, 16, 16, 4, 2))
# Loads of single values need a pointer each: few at a time.
UNALIGNED = (Config(64, 64, 16, 4, 2), Config(64, 16, 16, 4, 2))

# Filled by whoever has measured; looked up before the rule of thumb.
TUNED: dict[Problem, Config] = {}


def choose(problem: Problem, device: torch.device) -> Config:
    """The tuned configuration of a problem, or the largest tile that still gives every multiprocessor one."""
    found = TUNED.get(problem)
    return _rule(problem, multiprocessors(device)) if found is None else found


def candidates(problem: Problem, device: torch.device) -> list[Config]:
    """What is worth timing for a problem, the rule's choice first."""
    units = multiprocessors(device)
    found = [_rule(problem, units)]
    for config in _configs(problem):
        if config.n < 2 * problem.cout:
            splits = {1, _splits(config, problem, units), _splits(config, problem, 2 * units)}
            found += [replace(config, splits=count) for count in sorted(splits)]
    return list(dict.fromkeys(found))


@cache
def _rule(problem: Problem, units: int) -> Config:
    fitting = [c for c in _configs(problem) if c.n < 2 * problem.cout or c.n == 16]
    for config in fitting:
        if _programs(config, problem) >= units:
            return config
    smallest = min(fitting, key=lambda c: (-min(_programs(c, problem), units), -c.m * c.n))
    return replace(smallest, splits=_splits(smallest, problem, 2 * units))


def _configs(problem: Problem) -> tuple[Config, ...]:
    if problem.item != 2:
        return FLOAT
    return HALF if problem.aligned else UNALIGNED


def _programs(config: Config, problem: Problem) -> int:
    tiles = -(-problem.positions // config.m) * -(-problem.cout // config.n)
    return problem.samples * problem.phases * tiles


def _splits(config: Config, problem: Problem, programs: int) -> int:
    wanted = programs // _programs(config, problem)
    return max(1, min(wanted, problem.k // (config.k * LEAST_STEPS), MAX_SPLITS))


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
