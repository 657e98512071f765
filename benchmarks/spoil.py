"""Makes a training set with something to clean, and the truth to compare with: half of the faces spoiled on purpose.

    python benchmarks/spoil.py --data faces256 --out runs/spoiled --size 64

writes OUT/original and OUT/spoiled: the same aligned crops at --size, as PNG, with faces.csv. In the second a drawn
--share of split 'train' went through the test degradation of --level (its own seed each; column ``spoiled`` says
which); split 'val' is clean in both.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.training.data import FaceFile, list_faces, load_crop
from idm_fast.training.degradation import LEVELS, degrade_level

_COLUMNS = ("file", "split", "source", "native_px", "spoiled")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of aligned crops with faces.csv")
    parser.add_argument("--out", type=Path, required=True, help="new folder for original/ and spoiled/")
    parser.add_argument("--size", type=int, default=64, help="side of the crops in pixels (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of the training faces (default: %(default)s)")
    parser.add_argument("--level", choices=list(LEVELS), default="medium", help="how much (default: %(default)s)")
    parser.add_argument("--min-native-px", type=int, default=128, help="leave out crops enlarged from fewer pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the degradation")
    return parser.parse_args(arguments)


def _check_names(faces: Sequence[FaceFile]) -> None:
    """That no face would be written over another of its split."""
    known: dict[str, Path] = {}
    for face in faces:
        if (other := known.setdefault(face.path.stem, face.path)) != face.path:
            raise IdmFastError(f"{face.path}: must have a name of its own, but {other} is called the same")


def run(options: argparse.Namespace) -> dict[str, int]:
    """Writes both sets; returns the number of faces by what became of them."""
    if not 0 <= options.share <= 1:
        raise IdmFastError(f"--share must lie in [0, 1], got {options.share}")
    if options.out.exists():
        raise IdmFastError(f"{options.out}: must be a new folder, but it is there")
    rng = np.random.default_rng(options.seed)
    counts = {"spoiled": 0, "kept": 0, "val": 0}
    rows = []
    for split in ("train", "val"):
        faces = list_faces(options.data, split, options.min_native_px if split == "train" else 0)
        _check_names(faces)
        for number, face in enumerate(tqdm(faces, unit="face", desc=split, disable=None)):
            clean = load_crop(face.path, options.size)
            chosen = split == "train" and bool(rng.random() < options.share)
            worse = degrade_level(clean, options.level, options.seed + number) if chosen else clean
            name = f"{split}/{face.path.stem}.png"
            for kind, picture in (("original", clean), ("spoiled", worse)):
                path = options.out / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(path)
            rows.append((name, split, face.source, face.native_px, int(chosen)))
            counts["val" if split == "val" else "spoiled" if chosen else "kept"] += 1
    for kind in ("original", "spoiled"):  # last: without its table a set is not complete
        with atomic(options.out / kind / "faces.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(rows if kind == "spoiled" else [(*row[:4], 0) for row in rows])
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        counts = run(options)
    except IdmFastError as error:
        print(f"spoil: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
