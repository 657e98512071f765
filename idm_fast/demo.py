"""``python -m idm_fast.demo``: a real photograph is spoiled, restored, and shown beside the spoiled one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from idm_fast.compare import side_by_side
from idm_fast.errors import IdmFastError
from idm_fast.faces.pipeline import find_faces
from idm_fast.images import Picture, picture_from_array, read_image, write_image
from idm_fast.registry import DEFAULT_MODEL
from idm_fast.restorer import Restorer
from idm_fast.training.degradation import LEVELS, degrade_photo


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m idm_fast.demo", description=__doc__)
    parser.add_argument(
        "--input", type=Path, metavar="FILE",
        help="your own photograph, restored as it is (default: scikit-image's astronaut, spoiled)",
    )  # fmt: skip
    parser.add_argument("--level", choices=sorted(LEVELS), default="medium", help="how the default picture is spoiled")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    except (IdmFastError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.output.is_dir():
        raise IdmFastError(f"{args.output}: output must be a folder or a new name, got a file")
    args.output.mkdir(parents=True, exist_ok=True)
    restorer = Restorer.from_pretrained(args.model)
    restorer.restore([], num_inference_steps=args.steps)  # a wrong option ends here
    picture = read_image(args.input) if args.input else astronaut(restorer, args.level)
    restorer.restore(picture, num_inference_steps=args.steps)  # the first call also sets the machine up
    started = time.perf_counter()
    result = restorer.restore(picture, num_inference_steps=args.steps, output_type="picture")
    total = 1000 * (time.perf_counter() - started)
    for name, shown in (
        ("input", picture), ("restored", result.picture), ("side_by_side", side_by_side(picture, result.picture)),
    ):  # fmt: skip
        write_image(shown, args.output / f"{name}.png")
    for note in result.notes:
        print(f"note: {note}")
    faces, network = len(result.faces), result.milliseconds["network"]
    print(f"{args.output}/side_by_side.png: {faces} face{'s' * (faces != 1)}, {total:.0f} ms in all", end="")
    if faces:
        models = ", ".join(sorted({face.model for face in result.faces}))
        rate = 1000 * sum(face.steps for face in result.faces) / network
        steps = f"{result.steps} step{'s' * (result.steps != 1)} a face"
        print(f", {network:.0f} ms in the network ({models}, {steps}, {rate:.1f} steps per second)", end="")
    print()


def astronaut(restorer: Restorer, level: str) -> Picture:
    """NASA's portrait of Eileen Collins as scikit-image ships it (public domain), spoiled as ``level`` says."""
    try:
        from skimage import data  # only the demo needs it
    except ImportError:
        raise IdmFastError("demo picture needs scikit-image: pip install scikit-image, or give --input FILE") from None
    sharp = picture_from_array(np.asarray(data.astronaut()))  # type: ignore[no-untyped-call,unused-ignore]
    (face,) = find_faces(sharp, restorer.detector, "largest")
    x0 = torch.from_numpy(sharp.pixels).permute(2, 0, 1) * 2 - 1
    y = degrade_photo(x0, level, seed=0, face_px=face.native_px)
    return sharp.with_pixels(((y.permute(1, 2, 0).numpy() + 1) / 2).clip(0, 1).astype(np.float32))


if __name__ == "__main__":
    sys.exit(main())
