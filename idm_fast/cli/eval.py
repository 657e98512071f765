"""idm-fast eval: how good restorers and pictures are, with intervals."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from idm_fast.clr_face import ClrFaceRestorer
from idm_fast.diffusion import SOLVERS
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.baseline import denoise_and_sharpen
from idm_fast.evaluation.changes import compared
from idm_fast.evaluation.environment import environment
from idm_fast.evaluation.inception import LIBRARIES, Inception
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.evaluation.niqe import Pristine, authors_model, blocks_of, fitted_model
from idm_fast.evaluation.parts import Parts
from idm_fast.evaluation.pictures import PictureSet, check_headers, fingerprint, load_at, picture_set
from idm_fast.evaluation.plots import draw
from idm_fast.evaluation.report import Report, Subject, evaluate
from idm_fast.face_model import FaceModel
from idm_fast.files import atomic
from idm_fast.registry import ESTIMATORS, METHODS, Method, Target, find_files, load_models
from idm_fast.sampling import GuidanceSettings, SampleSettings
from idm_fast.training.data import FaceFile, list_faces
from idm_fast.training.degradation import DEGRADATION_VERSION, LEVELS

_DESCRIPTION = """Judges restorers, and sets of pictures, against a reference set of clean faces. A restorer is shown
the faces spoiled by fixed degradations, next to the degraded input itself and to a restorer that has learnt nothing
(denoise + sharpen). Pictures are judged as they are: --pictures that have the name of a clean face are compared with
it, and all of them, and --samples, as a set."""
_EPILOG = """metrics, of a picture and its clean twin: psnr, ssim, lpips_alex, lpips_vgg, recognition (distance of face
recognition embeddings; one person is below 0.6), landmarks (mean distance of five landmarks, in per cent of the
distance of the eyes; pictures without a face are counted and named); of a picture alone: niqe; of a set, against the
clean faces: fd_vgg (Frechet distance of VGG16 features), fid (see --fid). Means come with 95 % bootstrap intervals,
distances of sets with those of a jackknife; such a distance falls as the sets grow: compare sets of one size.

With --json, what is finished is kept in FILE.parts: the same command goes on there and ends with the same answer.

exit code: 0 all good, 1 a result was not finite, 2 wrong usage, or a picture that cannot be judged (it is named),
130 stopped by Ctrl-C.

examples:
  idm-fast eval --data faces --model idm-face-128                              the shipped model at its defaults
  idm-fast eval --data faces --model idm-face-128 --steps 1 2 4 8 16 --sampler ddim dpmpp_2m --plots plots
  idm-fast eval --data faces --model idm-face-128 --model runs/mine/model.safetensors --json mine.json
  idm-fast eval --data faces --model clr-face-128 --parts unguided masked --against 'clr-face-128 (unguided)'
  idm-fast eval --data faces --pictures theirs --pictures cleaned --metrics psnr lpips_alex niqe
  idm-fast eval --data faces --split val --size 64 --samples generated         of a model that draws faces
"""
PARTS = {
    "vqgan": "the autoencoder alone", "unguided": "with the prior", "unmasked": "guided, everywhere",
    "masked": "guided within the mask, the whole model",
}  # fmt: skip
_OF_GUIDANCE = ("parts", "guidance_scale", "guidance_interval", "guidance_every", "guidance_resolution",
                "guidance_repeats")  # fmt: skip
METRICS = (*FaceMetrics.PAIRED, *FaceMetrics.ALONE, "fd_vgg")
_SHARP_PX = 250  # native side of the crops that are no enlargements, as in training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    p = parser.add_argument_group("reference set")
    p.add_argument("--data", type=Path, required=True, help="folder of clean aligned crops, with faces.csv or without")
    p.add_argument("--split", help="split of faces.csv to judge on (default: val; without faces.csv all pictures)")
    p.add_argument("--min-native-px", type=int, default=0, help="leave out crops enlarged from fewer pixels")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N faces")
    p.add_argument("--size", type=int, default=128, help="side in pixels of all that is judged; what "
                   "is larger is shrunk, what is smaller refused (default: %(default)s)")  # fmt: skip
    p = parser.add_argument_group("restorers")
    p.add_argument("--model", action="append", default=[], help="name or .safetensors file; may be repeated")
    p.add_argument("--steps", nargs="+", type=int, metavar="T", help="default: the model's")
    p.add_argument("--sampler", nargs="+", choices=list(SOLVERS), help="solvers (default: the model's)")
    p.add_argument(
        "--eta", type=float, help="randomness of ddim, dpmpp_2m_sde and euler_maruyama, 0..1 (default: the solver's)"
    )
    p.add_argument("--strength", type=float, help="below 1: start from the noised input (default: the model's)")
    p.add_argument("--method", choices=METHODS, help="difface: for unconditional models (default: conditional)")
    p.add_argument("--estimator", metavar="NAME|FILE", help="of difface: what it begins with (see idm-fast restore)")
    p.add_argument("--start-index", type=int, metavar="N", help="of difface: see idm-fast restore")
    p.add_argument("--levels", nargs="+", choices=list(LEVELS), help="of degradation (default: all)")
    p.add_argument(
        "--parts", nargs="+", choices=list(PARTS), metavar="PART",
        help=f"of CLR-Face models, a row each: {'; '.join(f'{name}: {text}' for name, text in PARTS.items())} "
        "(default: masked)",
    )  # fmt: skip
    p.add_argument(
        "--guidance-scale", nargs="+", type=float, metavar="S", help="of CLR-Face models (default: the model's)"
    )
    p.add_argument("--guidance-interval", type=float, nargs=2, metavar=("A", "B"), help="the guided part of the way")
    p.add_argument("--guidance-repeats", type=int, metavar="K", help="steps at a guided evaluation")
    p.add_argument("--guidance-every", type=int, metavar="K", help="a gradient at every K-th evaluation")
    p.add_argument("--guidance-resolution", type=int, metavar="PX", help="side at which faces are recognised")
    p.add_argument(
        "--against", nargs="+", metavar="ROW", help="also how the others differ from this row, face by face; its name "
        "as the table says it ('degraded input', 'idm-face-128', 'clr-face-128 (unguided)')",
    )  # fmt: skip
    p.add_argument("--no-baseline", action="store_true", help="leave out the denoise + sharpen rows")
    p = parser.add_argument_group("pictures")
    for flag, text in (
        ("--pictures", "restored or cleaned ones; compared with the clean face of the same name"),
        ("--samples", "generated ones; whatever their names, judged only as a set"),
    ):
        p.add_argument(flag, action="append", default=[], type=Path, metavar="DIR", help=f"{text}; may be repeated")
    p = parser.add_argument_group("metrics")
    known = (*METRICS, "fid")
    p.add_argument("--metrics", nargs="+", choices=known, metavar="NAME", help=f"default: {' '.join(METRICS)}")
    p.add_argument(
        "--niqe-model", choices=["authors", "reference"],
        help="whose sharp pictures NIQE compares with (default: the authors', where the package that has them is "
        "installed, else those of the reference set)",
    )  # fmt: skip
    p.add_argument("--fid", choices=LIBRARIES, help="also FID, by a library you have installed with its weights")
    p.add_argument("--fid-weights", type=Path, metavar="FILE", help="default: where that library keeps them")
    p.add_argument("--seed", type=int, default=0, help="of degradation, noise and intervals (default: %(default)s)")
    p = parser.add_argument_group("machine")
    p.add_argument("--batch-size", type=int, default=16, help="faces at once (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    dtypes = ["fp32", "bf16", "fp16", "int8"]
    p.add_argument("--dtype", choices=dtypes, help="of the restorers (default: the fastest sound one of the device)")
    p = parser.add_argument_group("results")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there; FILE.parts until then")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    p.add_argument("--plots", type=Path, metavar="DIR", help="write curves against steps, and bars, as PNG")


def run(args: argparse.Namespace) -> int:
    _check(args)
    faces = _faces(args)
    paths = [face.path for face in faces]
    levels = list(
        dict.fromkeys(args.levels or (list(LEVELS) if args.model or not (args.pictures or args.samples) else []))
    )
    subjects = _subjects(args) if levels else []
    against = list(dict.fromkeys(args.against or ()))
    for name in against:
        compared(subjects, name)  # a wrong one ends the run here
    sets: list[PictureSet] = []
    for kind, clean in ((args.pictures, paths), (args.samples, [])):
        for folder in {folder.resolve(): folder for folder in kind}.values():
            sets.append(picture_set(folder, clean, args.data, args.size, [known.name for known in sets]))
    check_headers([*paths, *(path for each in sets for path in each.paths)], args.size)
    metrics = _metrics(args, faces)
    reference = _named(args)
    settings = _settings(args)
    parts = None
    if args.json:
        every = {
            **settings, "reference": reference, "clean": fingerprint(paths), "crop_px": args.size,
            "batch_size": args.batch_size, "seed": args.seed, "degradation_version": DEGRADATION_VERSION,
            "levels": levels, "metrics": [*metrics.names, *metrics.notes(args.size)],
            "subjects": [[s.name, s.steps, s.sampler] for s in subjects],
            "pictures": [[each.name, fingerprint([*each.paths, *each.twins])] for each in sets],
            **environment(args.device),
        }  # fmt: skip
        parts = Parts(args.json.with_name(f"{args.json.name}.parts"), every)
    each_face = max(1, len(levels) * len(subjects))
    total = len(faces) * each_face + sum(len(each.paths) for each in sets)
    with tqdm(total=total, unit="face", file=sys.stderr, disable=None) as bar:

        def progress(done: int) -> None:  # told after each batch, and after batches that were finished before
            position = done * each_face if done <= len(faces) else len(faces) * (each_face - 1) + done
            bar.update(position - bar.n)

        report = evaluate(
            (load_at(path, args.size) for path in paths), [_ticking(s, bar) for s in subjects], metrics,
            levels=levels, reference=reference, seed=args.seed, batch_size=args.batch_size, device=args.device,
            progress=progress, names=[str(path.relative_to(args.data)) for path in paths], sets=sets, parts=parts,
            against=against,
        )  # fmt: skip
    report = replace(report, conditions=report.conditions | {"settings": settings})
    _write(report, args, parts)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("size", 32), ("batch_size", 1), ("seed", 0), ("min_native_px", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise IdmFastError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    for name, wants_folder in (("json", False), ("markdown", False), ("plots", True)):
        path = getattr(args, name)
        if path is not None and path.exists() and path.is_dir() != wants_folder:
            raise IdmFastError(f"--{name} must be a {'folder' if wants_folder else 'file'}, got {path}")
    if not args.model:
        for name in ("steps", "sampler", "eta", "strength", "dtype", "method", "against", *_OF_GUIDANCE):
            if getattr(args, name) is not None:
                raise IdmFastError(f"--{name.replace('_', '-')} is of restorers and must come with --model, got none")
    guided = not args.parts or {"unmasked", "masked"} & set(args.parts)
    for name in _OF_GUIDANCE:
        if not guided and name != "parts" and getattr(args, name) is not None:
            raise IdmFastError(f"--{name.replace('_', '-')} must come with a guided part, got {' '.join(args.parts)}")
    for name in ("estimator", "start_index"):
        if args.method != "difface" and getattr(args, name) is not None:
            raise IdmFastError(f"--{name.replace('_', '-')} must come with --method difface, got none")
    chosen = list(args.metrics or METRICS)
    if ("fid" in chosen) and not args.fid:
        raise IdmFastError(f"--metrics: fid needs --fid with one of {', '.join(LIBRARIES)}, got none")
    args.metrics = [*chosen, "fid"] if args.fid else chosen
    device, _ = Target(args.device).resolved()
    args.device = str(device)


def _faces(args: argparse.Namespace) -> list[FaceFile]:
    listed = (args.data / "faces.csv").is_file()
    if args.split and not listed and args.data.is_dir():
        raise IdmFastError(f"{args.data}: --split must be left out where there is no faces.csv, got {args.split!r}")
    args.split = (args.split or "val") if listed else None
    # Without a table every picture counts as training data, which is what it is called.
    return list_faces(args.data, args.split or "train", args.min_native_px)[: args.limit]


def _named(args: argparse.Namespace) -> str:
    name = args.data.resolve().name
    chosen = f"clean crops of split {args.split!r} of {name}" if args.split else f"the crops of {name}"
    return f"{chosen} with native_px >= {args.min_native_px}" if args.min_native_px else chosen


def _subjects(args: argparse.Namespace) -> list[Subject]:
    subjects = [Subject("degraded input", lambda y, seeds: y)]
    if not args.no_baseline:
        subjects.append(Subject("denoise + sharpen", lambda y, seeds: denoise_and_sharpen(y)))
    taken: set[str] = set()
    guided = False
    for name in dict.fromkeys(args.model):
        models = load_models(name, Target(args.device, args.dtype), _method(args))
        fitting = [model for model in models if model.size == args.size]
        if not fitting:
            raise IdmFastError(f"{name}: --size must be one of {sorted(m.size for m in models)}, got {args.size}")
        model = fitting[0]
        # Two files may hold models of one name: rounds of one training do.
        shown = name if model.config.name in taken else model.config.name
        taken.add(shown)
        if isinstance(model, ClrFaceRestorer) and "vqgan" in (args.parts or []):
            subjects.append(_reconstruction(model, f"{shown} (vqgan)"))
        for suffix, guidance in _guidances(args, model):
            for sampler in dict.fromkeys(args.sampler or [None]):
                for steps in dict.fromkeys(args.steps or [None]):
                    asked = SampleSettings(steps, sampler, args.eta, args.strength, guidance=guidance)
                    subjects.append(_walks(model, shown + suffix, asked))
        guided |= isinstance(model, ClrFaceRestorer)
    for name in () if guided else _OF_GUIDANCE:
        if getattr(args, name) is not None:
            raise IdmFastError(f"--{name.replace('_', '-')} must come with a CLR-Face model, got none")
    return subjects


def _method(args: argparse.Namespace) -> Method:
    given = {"name": args.method, "estimator": args.estimator, "start_index": args.start_index}
    return Method(**{name: value for name, value in given.items() if value is not None})


def _reconstruction(model: ClrFaceRestorer, name: str) -> Subject:
    return Subject(name, lambda y, seeds: model.reconstruct(y))


def _walks(model: FaceModel, name: str, asked: SampleSettings) -> Subject:
    full, evaluations = model.resolved(asked), model.evaluations(asked)  # and a wrong setting ends the run here

    def restore(y: Tensor, seeds: Tensor) -> Tensor:
        return model.restore(y, seeds, asked)

    return Subject(name, restore, model.steps(asked), full.sampler, evaluations)


def _guidances(args: argparse.Namespace, model: FaceModel) -> list[tuple[str, GuidanceSettings]]:
    """(what the row's name says of it, how a model is guided)."""
    interval = None if args.guidance_interval is None else tuple(args.guidance_interval)
    scales = list(dict.fromkeys(args.guidance_scale or [None]))
    rest = {
        "interval": interval, "every": args.guidance_every, "resolution": args.guidance_resolution,
        "repeats": args.guidance_repeats,
    }  # fmt: skip
    if not isinstance(model, ClrFaceRestorer):
        return [("", GuidanceSettings())]
    if args.parts and scales == [None] and {"unmasked", "masked"} & set(args.parts):
        if not model.config.guidance_scale:
            raise IdmFastError(f"--guidance-scale must be given: {model.config.name} has no scale of its own to judge")
        # Asked for, so that a row is never called guided where the recognition network is missing.
        scales = [model.config.guidance_scale]
    found: list[tuple[str, GuidanceSettings]] = []
    for part in dict.fromkeys(args.parts or ["masked"]):
        if part == "unguided":
            found.append((" (unguided)", GuidanceSettings(0.0)))
        elif part != "vqgan":
            for scale in scales:
                words = [*([part] if args.parts else []), *([f"scale {scale:g}"] if args.guidance_scale else [])]
                settings = GuidanceSettings(scale, **rest, masked=part == "masked")
                found.append((f" ({', '.join(words)})" if words else "", settings))
    return found


def _ticking(subject: Subject, bar: Any) -> Subject:
    """The same, moving the bar: one batch of faces may take many restorations."""

    def restore(y: Tensor, seeds: Tensor) -> Tensor:
        restored = subject.restore(y, seeds)
        bar.update(len(y))
        return restored

    return replace(subject, restore=restore)


def _metrics(args: argparse.Namespace, faces: list[FaceFile]) -> FaceMetrics:
    try:
        if "niqe" in args.metrics:
            blocks_of(args.size)
        pristine = _pristine(args, faces) if "niqe" in args.metrics else None
        inception = Inception(args.fid, args.fid_weights, args.device) if args.fid else None
        return FaceMetrics(args.device, args.metrics, pristine=pristine, inception=inception)
    except IdmFastError as error:
        raise IdmFastError(f"{error} (--metrics chooses what to measure)") from None


def _pristine(args: argparse.Namespace, faces: list[FaceFile]) -> Pristine:
    if args.niqe_model != "reference":
        try:
            return authors_model()
        except IdmFastError as error:
            if args.niqe_model:
                raise
            print(f"idm-fast: {error}; a model of the reference set takes its place", file=sys.stderr)
    sharp = [face for face in faces if face.native_px >= _SHARP_PX] or faces
    return fitted_model((load_at(face.path, args.size) for face in sharp), f"{len(sharp)} faces of {_named(args)}")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on besides the reference set, for the results file."""
    files = {str(file): _digest(file) for name in args.model for file in find_files(name)}
    how: dict[str, Any] = {}
    if args.method == "difface":
        method = _method(args)
        named = str(method.estimator) in ESTIMATORS
        begins = str(method.estimator) if named else [_digest(file) for file in find_files(method.estimator)]
        how = {"method": method.name, "estimator": begins, "start_index": method.start_index}
    return how | {
        "models": {name: [files[str(file)] for file in find_files(name)] for name in args.model},
        "eta": args.eta, "strength": args.strength, "dtype": args.dtype, "torch_device": args.device,
        "guidance": {
            "scales": args.guidance_scale, "interval": args.guidance_interval, "every": args.guidance_every,
            "resolution": args.guidance_resolution, "repeats": args.guidance_repeats,
        },
    }  # fmt: skip


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(report: Report, args: argparse.Namespace, parts: Parts | None) -> None:
    table = report.as_markdown()
    if args.json:
        with atomic(args.json) as path:
            path.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if args.markdown:
        with atomic(args.markdown) as path:
            path.write_text(table)
    for picture in draw(report, args.plots) if args.plots else []:
        print(f"idm-fast: wrote {picture}", file=sys.stderr)
    if parts:
        parts.remove()
    print(table, end="")
