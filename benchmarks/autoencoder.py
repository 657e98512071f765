"""The compiled autoencoder against its plain modules and against diffusers, on the same weights, taking turns.

``python benchmarks/autoencoder.py --preset vq-face-128 vq-f4 [--size 256] [--dtype bf16] [--json FILE]``. A row a
preset and direction; a decode finds its codes too. ``torch`` is the network as one writes it, in the same dtype;
``diffusers`` its VQModel, where the preset is one. What is further from float32 than twice the plain network's error is
not timed, and ends the run with 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idm_fast.bench.machine import machine
from idm_fast.bench.text import markdown
from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.checkpoints import diffusers_vqgan
from idm_fast.config_vqgan import VQGAN_PRESETS, VqganConfig, vqgan_preset
from idm_fast.engine.autoencoder import AutoencoderEngine
from idm_fast.engine.precision import chosen_device, chosen_dtype
from idm_fast.files import atomic
from idm_fast.models.vqgan import Vqgan
from idm_fast.ops import use_backend

HEAD = ("preset", "px", "what", "dtype", "engine ms", "torch", "diffusers")
Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # encode, decode


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=sorted(VQGAN_PRESETS), default=["vq-face-128"])
    parser.add_argument("--size", type=int, help="side in pixels (default: the preset's)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="default: the fastest sound one of the device"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


def network(config: VqganConfig) -> Vqgan:
    """Random weights with codes where the latents are, or all positions would choose one of them."""
    torch.manual_seed(0)
    module = Vqgan(config).eval().requires_grad_(False)
    torch.nn.init.normal_(module.codebook.weight)
    return module


def plain(module: Vqgan, dtype: torch.dtype, device: torch.device) -> Pair:
    module = copy.deepcopy(module).to(device, dtype)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with use_backend("torch"):
                return function(x.to(dtype)).float()

        return run

    return call(module.encode), call(module.decode)


def library(module: Vqgan, dtype: torch.dtype, device: torch.device) -> Pair | None:
    """diffusers' VQModel with the same weights; None where it is not installed or has no such network."""
    c = module.config
    try:
        from diffusers import VQModel
    except ImportError:
        return None
    if c.unshuffle > 1:
        return None
    with tempfile.TemporaryDirectory() as folder:
        diffusers_vqgan.write(folder, module)
        model = VQModel.from_pretrained(folder, low_cpu_mem_usage=False).eval().to(device, dtype)
    model.to(memory_format=torch.channels_last)
    return (lambda x: model.encode(x.to(dtype)).latents.float(), lambda z: model.decode(z.to(dtype)).sample.float())


@torch.no_grad()
def rows(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    device = chosen_device(args.device)
    dtype, _ = chosen_dtype(args.dtype, device)
    module = network(vqgan_preset(name))
    side = args.size or module.config.image_size
    x = torch.rand(args.batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = module.to(device)
    latent = exact.encode(x.to(device))
    codes = exact.quantize(latent)[0]  # a decode of the codes themselves: rounding does not choose others
    engine = AutoencoderEngine.compile(module, (args.batch, side, side), dtype=dtype, device=device)
    pairs = {"engine": (engine.encode, engine.decode), "torch": plain(module, dtype, device)}
    other = library(module, dtype, device)
    if other is not None:
        pairs["diffusers"] = other
    found = []
    for index, (what, given, truth) in enumerate((("encode", x, latent), ("decode", codes, exact.decode(codes)))):
        given = given.to(device)
        errors = {who: (pair[index](given) - truth).square().mean().sqrt().item() for who, pair in pairs.items()}
        row: dict[str, Any] = {"preset": name, "size": side, "batch": args.batch, "what": what, "dtype": str(dtype)[6:]}
        row |= {"rms": truth.square().mean().sqrt().item(), "errors": errors}
        if not errors["engine"] <= max(2 * errors["torch"], 1e-5 * row["rms"]):
            found.append(row | {"wrong": True})
            continue
        calls = {who: Candidate(lambda _, run=pair[index], given=given: run(given)) for who, pair in pairs.items()}
        times = interleaved(calls, str(device), args.seconds)
        found.append(row | {"ms": {who: round(1e3 * spread.median, 3) for who, spread in times.items()}})
    return found


def text(row: dict[str, Any]) -> list[str]:
    said = [row["preset"], str(row["size"]), row["what"], row["dtype"]]
    if row.get("wrong"):
        return [*said, f"wrong: {row['errors']}", "", ""]
    ms = row["ms"]
    against = [
        f"{ms[who]:.1f} ms, {ms[who] / ms['engine']:.2f}x" if who in ms else "-" for who in ("torch", "diffusers")
    ]
    return [*said, f"{ms['engine']:.1f}", *against]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    result: dict[str, Any] = {"machine": machine(chosen_device(args.device)), "threads": torch.get_num_threads()}
    result["rows"] = []
    for name in args.preset:
        result["rows"] += rows(args, name)
        if args.json is not None:
            with atomic(args.json) as path:
                path.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(HEAD, [text(row) for row in result["rows"]]))
    return 1 if any(row.get("wrong") for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
