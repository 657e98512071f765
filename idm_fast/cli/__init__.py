"""The command ``idm-fast``: one file a verb, each with ``add_arguments(parser)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from threading import current_thread, main_thread

from idm_fast import __version__
from idm_fast.errors import IdmFastError

VERBS = {
    "restore": "restore the faces of photographs",
    "clean": "enhance a data set of faces with a restorer, for training on it",
    "train": "train a model",
    "eval": "measure how good restorers and pictures are",
    "convert": "make a model file of another project's weights",
    "info": "say what a model file is",
    "bench": "time steps a second, ours against others",
    "profile": "take one step apart: time, bytes and FLOPs of every call",
    "ops": "list operations and back ends, with the reason where one cannot run",
}
_EXAMPLES = """examples:
  idm-fast restore photo.jpg -o out            restore the faces of one photograph
  idm-fast restore album -o out --compare      a folder, with before/after pictures
  idm-fast train intrinsic --data faces --out runs/mine
  idm-fast eval --data faces --model idm-face-128 --steps 1 4 --plots plots
  idm-fast info idm-face-128                   what a model file is
  idm-fast convert difface.pth difface.safetensors
  idm-fast bench --peers                       steps a second, against torch, OpenVINO and others
  idm-fast profile                             where the time of a step goes
  idm-fast ops                                 which kernels run here, and why not the others
Each verb has its own --help.
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever cleans up and says what was done after Ctrl-C does so after it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code: 0 all good, 1 some of it failed, 2 wrong usage, 130 stopped by Ctrl-C,
    143 by SIGTERM.

    argparse itself ends the process (``SystemExit``) for --help, --version and what it cannot parse (code 2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    try:
        with _terminable(), _warned():
            args = _parser(argv).parse_args(argv)
            code = int(import_module(f"idm_fast.cli.{args.verb}").run(args))
            sys.stdout.flush()  # a closed pipe shows here and not after the end
        return code
    except KeyboardInterrupt as error:
        print("idm-fast: stopped", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 1
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"idm-fast: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, IdmFastError) else 1


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises ``Terminated`` inside the block, where nobody else has said what it is to do."""
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    owner = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() == owner:
            raise Terminated
        # A worker that was forked has this too: it ends as if nobody had asked.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _warned() -> Iterator[None]:
    """Warnings of ours are one line in our words, and not a line of source with its place."""
    before = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, RuntimeWarning):
            return f"idm-fast: warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; of the verbs only one that ``argv`` names is filled in, since most of them import torch."""
    parser = argparse.ArgumentParser(
        prog="idm-fast",
        description="Restores faces in photographs with diffusion models, fast.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"idm-fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv:
            import_module(f"idm_fast.cli.{name}").add_arguments(verb)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
