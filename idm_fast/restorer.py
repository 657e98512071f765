"""``Restorer``: a photograph in, the photograph with its faces restored out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idm_fast import registry
from idm_fast.difface import START_INDEX
from idm_fast.diffusion import CORRECTOR_SNR
from idm_fast.errors import IdmFastError
from idm_fast.face_model import FaceModel
from idm_fast.faces.align import AlignedFace
from idm_fast.faces.detect import FaceDetector
from idm_fast.faces.pipeline import crop_of, find_faces, paste_faces, upscaled, whole_picture
from idm_fast.images import Picture, picture_from_array, picture_from_pil, read_image
from idm_fast.options import OUTPUT_TYPES, RestoreOptions, seed_from
from idm_fast.result import RestoredFace, Result, as_output, describe
from idm_fast.sampling import SampleSettings, guidance_settings

ImageLike = str | Path | Image.Image | np.ndarray | Picture
Progress = Callable[[int, int], None]

__all__ = ["OUTPUT_TYPES", "ImageLike", "RestoreOptions", "RestoredFace", "Restorer", "Result", "as_picture"]


class Restorer:
    """Finds, aligns, restores and pastes back the faces of photographs.

    >>> restorer = Restorer.from_pretrained("idm-face")
    >>> result = restorer.restore("photo.jpg", num_inference_steps=4)
    >>> result.save("restored.png")
    """

    def __init__(self, models: list[FaceModel], detector: FaceDetector | None = None) -> None:
        self.models = models
        self._detector = detector

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = registry.DEFAULT_MODEL,
        *,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        engine: bool = True,
        cache_every: int = 1,
        method: str = "conditional",
        estimator: str | Path = registry.DEFAULT_MODEL,
        start_index: int = START_INDEX,
        settings: Mapping[str, Any] | None = None,
    ) -> Restorer:
        """A restorer from a shipped family or model, a model file, a diffusers folder, or a Hugging Face Hub id.

        A family ("idm-face") holds a model per face size and picks one for each face. A file may be one of ours
        (.safetensors) or a public project's (see ``idm_fast.checkpoints.load``): ``settings`` then says what its keys
        cannot tell. A name of the form owner/name that is no path here is fetched from the Hub, which needs the package
        ``huggingface_hub``.

        ``method``: "conditional" for models that are shown the degraded face; "difface" for unconditional ones, which
        go on from an estimate, noised to index ``start_index`` of the 250-step chain (lower stays nearer to it).
        ``estimator``: "bicubic", a restorer's name ("idm-face"), or a file of one or of DifFace's SwinIR.

        ``device``: "cpu" or "cuda"; ``dtype``: "fp32", "bf16", "fp16" (CUDA), or lossy "int8" (CPU) and "fp8" (sm_90);
        ``backend``: forces one kernel back end, or several in order of preference ("cpu,torch"). All default to the
        fastest sound choice. ``engine=False`` runs the networks' plain modules instead of compiled plans: slower, and
        what a plan is judged by. ``cache_every`` k > 1 is lossy and for walks of several steps: the network's inner
        levels run only at every k-th evaluation. Raises ``IdmFastError`` for unknown names, broken files, models that
        do not restore by the method, and back ends of which none can run some operation here.
        """
        target = registry.Target(device, dtype, backend, engine, cache_every)
        how = registry.Method(method, estimator, start_index)
        return cls(registry.load_models(name_or_path, target, how, settings))

    @property
    def detector(self) -> FaceDetector:
        """Made at the first photograph, so that aligned crops need no detector."""
        if self._detector is None:
            self._detector = FaceDetector()
        return self._detector

    def restore(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        strength: float | None = None,
        respacing: str | None = None,
        corrector_steps: int = 0,
        corrector_snr: float = CORRECTOR_SNR,
        identity_guidance: bool = True,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_repeats: int | None = None,
        guidance_every: int | None = None,
        guidance_resolution: int | None = None,
        seed: int = 0,
        generator: torch.Generator | int | None = None,
        face: str = "all",
        blend: float = 1.0,
        upscale: float = 1.0,
        aligned: bool = False,
        batch_size: int = 8,
        output_type: str = "pil",
        progress: Progress | None = None,
    ) -> Any:
        """Restores one picture (a ``Result``) or several (a list of them, in order).

        - ``images``: paths, Pillow images, arrays (uint8, uint16, or float32 in 0..1; [H, W] or [H, W, 1 to 4]) or
          ``Picture``. All faces of all pictures go through the network together, ``batch_size`` at a time.
        - ``num_inference_steps``, ``sampler``, ``eta``, ``strength``: None is the model's own default. ``strength`` in
          (0, 1]: 1 starts from pure noise, less from the noised input. ``respacing``, instead of the number of steps:
          the training steps to walk, as guided-diffusion writes them ("ddim250", "250", "10,15,20").
          ``corrector_steps``: Langevin steps at each noise level between, of the size ``corrector_snr``.
        - of CLR-Face models: ``guidance_scale`` >= 0, how far a step moves a face towards the identity that was
          recovered; ``guidance_repeats``, in how many steps; ``guidance_interval`` (start, stop), the part of the way,
          in 0..1, where it is; ``guidance_every`` k, faster and lossy: a gradient at every k-th evaluation only;
          ``guidance_resolution``, the same: side in pixels at which faces are recognised. None is the model's own.
          ``identity_guidance=False`` goes without, and so does, with a warning, a model's own guidance where the
          recognition network is not installed.
        - ``seed``: face k of every picture, largest first, draws its noise from seed + k, so a result does not depend
          on what it was batched with. ``generator``, as diffusers has it, takes the place of ``seed``: a number is
          the seed, a ``torch.Generator`` gives one.
        - ``face``, ``blend``, ``upscale``, ``aligned``: as in ``RestoreOptions``.
        - ``output_type``: what ``Result.image`` is. "pil": 8 bits; "np": uint8, or uint16 of a 16-bit picture;
          "picture": a ``Picture``.
        - ``progress(done, all)`` counts network evaluations.

        Raises ``IdmFastError`` naming the option or the picture that is wrong. Options are checked first, so an empty
        list checks them and does nothing else.
        """
        seed = seed if generator is None else seed_from(generator)
        options = RestoreOptions(face, blend, upscale, aligned, batch_size, seed, output_type)
        settings = SampleSettings(
            num_inference_steps, sampler, eta, strength, respacing, corrector_steps, corrector_snr,
            guidance_settings(
                identity_guidance, guidance_scale, guidance_interval, guidance_every, guidance_resolution,
                guidance_repeats,
            ),
        )  # fmt: skip
        for model in self.models:
            model.evaluations(settings)  # builds its table, or says what is wrong
        detector = None if aligned else self.detector
        if isinstance(images, str | Path | Image.Image | np.ndarray | Picture) or not isinstance(images, Iterable):
            return self._restore([as_picture(images)], options, settings, detector, progress)[0]
        pictures = [as_picture(image, f"images[{i}]") for i, image in enumerate(images)]
        return self._restore(pictures, options, settings, detector, progress)

    def _restore(
        self,
        pictures: list[Picture],
        options: RestoreOptions,
        settings: SampleSettings,
        detector: FaceDetector | None,
        progress: Progress | None,
    ) -> list[Result]:
        found, detect_ms = [], []
        for picture in pictures:
            started = time.perf_counter()
            whole = detector is None
            found.append([whole_picture(picture)] if whole else find_faces(picture, detector, options.face))
            detect_ms.append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()
        jobs = [(index, face, k) for index, faces in enumerate(found) for k, face in enumerate(faces)]
        chosen = [registry.choose(self.models, face.native_px * options.upscale) for _, face, _ in jobs]
        before, restored = self._run(pictures, jobs, chosen, options, settings, progress)
        network_ms = 1000 * (time.perf_counter() - started) / max(1, len(jobs))

        results = []
        for index, (picture, faces) in enumerate(zip(pictures, found, strict=True)):
            started = time.perf_counter()
            mine = [n for n, job in enumerate(jobs) if job[0] == index]
            base, moved = upscaled(picture, faces, options.upscale)
            if mine:
                base = paste_faces(
                    base, moved, [restored[n] for n in mine], originals=[before[n] for n in mine],
                    blend=options.blend, aligned=options.aligned,
                )  # fmt: skip
            described = [
                describe(face, chosen[n].config.name, chosen[n].steps(settings))
                for face, n in zip(faces, mine, strict=True)
            ]
            image = as_output(base, options.output_type)
            times = {"detect": detect_ms[index], "network": network_ms * len(mine)}
            times["paste"] = 1000 * (time.perf_counter() - started)
            notes = list(picture.notes) + ([] if mine else ["no face found"])
            changed = bool(mine) or base is not picture
            results.append(Result(image, base, described, times, notes, changed))
        return results

    def _run(
        self,
        pictures: list[Picture],
        jobs: list[tuple[int, AlignedFace, int]],
        chosen: list[FaceModel],
        options: RestoreOptions,
        settings: SampleSettings,
        progress: Progress | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Crops [3, S, S] before and after, in the order of ``jobs``; each model's faces go in batches of their own."""
        before_crops: list[Tensor] = [torch.empty(0)] * len(jobs)
        restored: list[Tensor] = [torch.empty(0)] * len(jobs)
        evaluations = sum(model.evaluations(settings) for model in chosen)
        done = 0
        for model in dict.fromkeys(chosen):
            numbers = [n for n, which in enumerate(chosen) if which is model]
            for first in range(0, len(numbers), options.batch_size):
                batch = numbers[first : first + options.batch_size]
                y = torch.stack([crop_of(pictures[jobs[n][0]], jobs[n][1], model.size) for n in batch])
                seeds = torch.tensor([int(options.seed) + jobs[n][2] for n in batch], dtype=torch.int64)
                before = done

                def report(e: int, before: int = before, size: int = len(batch)) -> None:
                    if progress is not None:
                        progress(before + (e + 1) * size, evaluations)

                # Where nobody watches, a GPU runs the whole walk as one graph.
                out_crops = model.restore(y, seeds, settings, None if progress is None else report)
                for n, crop, out in zip(batch, y, out_crops, strict=True):
                    before_crops[n], restored[n] = crop, out
                done = before + model.evaluations(settings) * len(batch)
        return before_crops, restored


def as_picture(image: ImageLike, name: str = "image") -> Picture:
    """Reads, wraps or passes on; raises ``IdmFastError``, with the path or ``name``, for what is not a picture."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return picture_from_pil(image, name)
    if isinstance(image, np.ndarray):
        return picture_from_array(image, name)
    raise IdmFastError(f"{name} must be a path, a Pillow image, an array or a Picture, got {type(image).__name__}")
