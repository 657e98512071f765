"""idm-fast restore: photographs in, photographs with restored faces out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from idm_fast.checkpoints.settings import from_pairs
from idm_fast.cli.guidance import add_guidance, guidance_of
from idm_fast.cli.inputs import collect
from idm_fast.cli.session import Session
from idm_fast.crops import SampleSettings
from idm_fast.difface import START_INDEX
from idm_fast.diffusion import CORRECTOR_SNR, SOLVERS
from idm_fast.engine.lossy import REUSE_COST, TIERS
from idm_fast.kernels import BACKENDS
from idm_fast.registry import DEFAULT_MODEL, ESTIMATORS, FAMILIES, METHODS, shipped
from idm_fast.restorer import Restorer

_DESCRIPTION = """Finds the faces of each picture, restores them and pastes them back; nothing else in the picture
changes. A picture without a face is copied. One broken file does not stop the rest."""
_EPILOG = """exit code: 0 all good, 1 some pictures failed (each is named on standard error), 2 wrong usage
(nothing was done), 130 stopped by Ctrl-C, 143 by SIGTERM (what was written is whole).

--json prints one document, {"items": [{"input", "output", "faces", "ms", "error"}, ...]}, in the
order of the inputs, also when some failed or the run was stopped; "output" is null where "error"
is not. On wrong usage it prints nothing.

examples:
  idm-fast restore photo.jpg -o restored.png
  idm-fast restore album 'scans/*.tif' -o out --compare --skip-existing
  idm-fast restore old.jpg -o out --upscale 2 --steps 8     larger, and sharper but freer
  idm-fast restore crops -o out --aligned                   face crops as FFHQ frames them
  idm-fast restore old.jpg -o out --model clr-face-128      over latents, guided to the person
  idm-fast restore old.jpg -o out --model iddpm_ffhq512.pth --method difface --estimator swinir.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders (searched below) or quoted globs")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, or a file for a single input")

    p = parser.add_argument_group("model")
    names = ", ".join([*FAMILIES, *shipped()])
    p.add_argument(
        "--model", default=DEFAULT_MODEL,
        help=f"{names}; a model file, ours or a public project's; a diffusers folder; or owner/name of the Hugging "
        "Face Hub (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="what the keys of a public project's file cannot tell (see idm-fast convert)",
    )  # fmt: skip
    p.add_argument(
        "--method", choices=METHODS, default="conditional",
        help="conditional: the model is shown the degraded face (default); difface: an unconditional one goes on from "
        "a noised estimate of the clean face",
    )  # fmt: skip
    p.add_argument(
        "--estimator", metavar="NAME", default=DEFAULT_MODEL,
        help=f"of difface: {', '.join(ESTIMATORS)}, {', '.join(FAMILIES)}, or a file of DifFace's SwinIR "
        "(default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--start-index", type=int, default=START_INDEX, metavar="N",
        help="of difface: where in its chain it begins; less stays nearer to the estimate (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--steps", type=int, help="sampling steps; more is sharper, slower and freer (default: the model's)")
    p.add_argument(
        "--respacing",
        metavar="STEPS",
        help="instead of --steps, as guided-diffusion writes it: ddim250, 250 or 10,15,20",
    )
    p.add_argument(
        "--sampler", choices=list(SOLVERS), metavar="NAME", help=f"{', '.join(SOLVERS)} (default: the model's)"
    )  # fmt: skip
    p.add_argument(
        "--corrector-steps", type=int, default=0, metavar="N",
        help="Langevin steps of the score SDE at each noise level, one network evaluation each (default: none)",
    )  # fmt: skip
    p.add_argument(
        "--corrector-snr", type=float, default=CORRECTOR_SNR, metavar="R", help="their size (default: %(default)s)"
    )
    p.add_argument(
        "--eta", type=float, help="randomness of ddim, dpmpp_2m_sde and euler_maruyama, 0..1 (default: the solver's)"
    )
    p.add_argument("--seed", type=int, default=0, help="the noise; same seed, same picture (default: %(default)s)")
    p.add_argument(
        "--strength", type=float,
        help="1 starts from pure noise, less from the noised input and so stays nearer to it (default: the model's)",
    )  # fmt: skip

    add_guidance(parser)

    p = parser.add_argument_group("picture")
    p.add_argument("--face", choices=["all", "largest", "center"], default="all", help="which faces (default: all)")
    p.add_argument("--blend", type=float, default=1.0, help="0 keeps the input, 1 takes the restored face whole")
    p.add_argument("--upscale", type=float, default=1.0, help="enlarge the whole picture by this factor, 1..8")
    p.add_argument("--aligned", action="store_true", help="each input is one square, aligned face crop")

    p = parser.add_argument_group("machine")
    p.add_argument("--batch-size", type=int, default=8, help="faces a network call (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    p.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16", "int8", "fp8"],
        help="default: the fastest sound one of the device; int8 (CPU) and fp8 (CUDA, sm_90) are lossy",
    )  # fmt: skip
    p.add_argument(
        "--cache-every", type=int, default=1, metavar="K",
        help="lossy above 1, for walks of several steps: the network's inner levels at every K-th step only",
    )  # fmt: skip
    p.add_argument("--no-engine", dest="engine", action="store_false", help="plain modules instead of compiled plans")
    p.add_argument(
        "--backend", metavar="NAME[,NAME]",
        help=f"force kernel back ends, in order of preference: {', '.join(BACKENDS)}. Not each has every operation: "
        "cpu,torch takes torch where cpu has none (see idm-fast ops)",
    )  # fmt: skip

    p = parser.add_argument_group("files")
    p.add_argument("--suffix", default="", help="text behind the output's stem")
    p.add_argument("--ext", default="auto", help="png, jpg, webp, tif, bmp; auto: the input's, or png (default: auto)")
    p.add_argument("--compare", action="store_true", help="also write NAME.compare.png, before and after side by side")
    p.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    p.add_argument("--skip-existing", action="store_true", help="leave out inputs whose output is already there")
    p.add_argument("--halt-on-error", action="store_true", help="stop at the first picture that fails")


def run(args: argparse.Namespace) -> int:
    if args.dtype in TIERS:
        print(f"idm-fast: {args.dtype} is lossy: {TIERS[args.dtype].cost}", file=sys.stderr)
    jobs = collect(args.inputs, args.output, args.suffix, args.ext)
    restorer = Restorer.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, backend=args.backend, engine=args.engine,
        cache_every=args.cache_every, method=args.method, estimator=args.estimator, start_index=args.start_index,
        settings=from_pairs(args.settings),
    )  # fmt: skip
    options = {
        "num_inference_steps": args.steps, "sampler": args.sampler, "eta": args.eta, "strength": args.strength,
        "respacing": args.respacing, "corrector_steps": args.corrector_steps, "corrector_snr": args.corrector_snr,
        "seed": args.seed, "face": args.face, "blend": args.blend,
        "upscale": args.upscale, "aligned": args.aligned, "batch_size": args.batch_size, "output_type": "picture",
        **guidance_of(args),
    }  # fmt: skip
    restorer.restore([], **options)  # a wrong option ends the run here, before any work
    if args.cache_every > 1:
        asked = SampleSettings(args.steps, args.sampler, args.eta, args.strength, args.respacing, args.corrector_steps)
        skips = any(model.evaluations(asked) > 1 for model in restorer.models)
        said = f"is lossy: {REUSE_COST}" if skips else "changes nothing where the network runs once"
        print(f"idm-fast: --cache-every {args.cache_every} {said}", file=sys.stderr)
    session = Session(
        jobs, restorer, options, compare=args.compare, skip_existing=args.skip_existing,
        halt_on_error=args.halt_on_error, debug=args.debug,
    )  # fmt: skip
    try:
        session.run()
    finally:  # a run that is stopped still says what it did
        session.close(as_json=args.json)
    return 1 if session.failed else 0
