"""Model files of the Hugging Face Hub. ``huggingface_hub`` is optional: files need neither it nor a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from idm_fast.errors import IdmFastError

WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>{_PART}))?")
_STEM = "diffusion_pytorch_model"
_PARTS = ("unet/", "vqvae/", "vae/", "")  # where a diffusers folder has its network
_TEXTS = ("model_index.json", "scheduler/scheduler_config.json")


def looks_like_id(name: str) -> bool:
    """Whether ``name`` is of the form owner/name or owner/name@revision, and does not end like a weights file."""
    return _ID.fullmatch(name) is not None and Path(name.partition("@")[0]).suffix.lower() not in WEIGHTS


def fetch(name: str) -> Path:
    """The diffusers folder or the one weights file of a repository, from the Hub or from its cache on this machine.

    ``name``: owner/name, or owner/name@revision. Only the network's own files are fetched. Raises ``IdmFastError``
    where ``huggingface_hub`` is not installed, the repository cannot be reached, or it holds not exactly one model.
    """
    found = _ID.fullmatch(name)
    if found is None:
        raise IdmFastError(f"hub: model must be named as owner/name or owner/name@revision, got {name!r}")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise IdmFastError(
            f"{name}: nothing of this name is here, and the Hugging Face Hub needs the package huggingface_hub "
            "(pip install huggingface_hub); a local file or folder needs neither"
        ) from None
    repo, revision = found["repo"], found["revision"]
    try:
        wanted = choose(name, list(hub.list_repo_files(repo, revision=revision)))
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except IdmFastError:
        raise
    except Exception as error:  # offline, no such repository, a gated one: its own words say which
        kept = _cached(hub, repo, revision)
        if kept is None:
            raise IdmFastError(
                f"{name}: nothing of this name is here, and the Hugging Face Hub did not give it: {_first_line(error)}"
            ) from None
        folder, here = kept, [str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()]
        wanted = choose(name, here)
    weights = next(file for file in wanted if Path(file).suffix in WEIGHTS)
    return folder / weights if wanted == [weights] else folder


def choose(name: str, files: list[str]) -> list[str]:
    """Those of a repository's files that make one model: a diffusers folder's, else its only weights file."""
    for part in _PARTS:
        if f"{part}config.json" not in files:
            continue
        for ending in (".safetensors", ".bin"):
            if f"{part}{_STEM}{ending}" in files:
                texts = [text for text in _TEXTS if text in files]
                return [f"{part}{_STEM}{ending}", f"{part}config.json", *texts]
    weights = sorted(file for file in files if Path(file).suffix.lower() in WEIGHTS)
    if len(weights) != 1:
        raise IdmFastError(
            f"{name}: repository must hold a diffusers model or one weights file, got {len(weights)} of them "
            f"{weights[:4]}; download the one you mean and name it"
        )
    return weights


def _cached(hub: Any, repo: str, revision: str | None) -> Path | None:
    """What an earlier run has left on this machine."""
    try:
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
        return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
