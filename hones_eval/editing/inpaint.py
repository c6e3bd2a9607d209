"""Edits by any diffusers inpainting checkpoint, with the settings of the V-SEAM paper as defaults.

Sides are cut to multiples of 8, masked pixels blanked, negative prompt "low quality, blurry", 50 steps,
guidance 7.5, and the result is brought back to the image's size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from hones_eval.choices import DType
from hones_eval.editing.masks import Region
from hones_eval.editing.photographs import Pixels
from hones_eval.editing.problems import RecordError, no_memory
from hones_eval.errors import HonesError


@dataclass(frozen=True)
class InpaintSettings:
    """Settings of an inpainting checkpoint."""

    checkpoint: str
    steps: int = 50
    guidance: float = 7.5
    negative_prompt: str = "low quality, blurry"
    longest_side: int = 1024
    """Larger images are painted at this size; only masked pixels are kept."""
    composite: bool = True
    """Keep the clean pixels outside the mask; if off, use the checkpoint's whole image."""
    batch: int = 1
    device: str = "auto"
    dtype: DType = "auto"
    offload: bool = False
    """Keep parts of the model on the CPU until they run."""


class Painting(NamedTuple):
    """One image to inpaint."""

    image: Pixels
    region: Region
    prompt: str
    seed: int


class Inpainter:
    """A loaded inpainting pipeline."""

    def __init__(self, settings: InpaintSettings) -> None:
        """Load the checkpoint.

        Raises: HonesError without diffusers, for what is no inpainting checkpoint, or without memory for it.
        """
        self.settings = settings
        self._device = _device(settings.device)
        self._pipeline = _load(settings, self._device)

    def paint(self, jobs: Sequence[Painting]) -> Iterator[Pixels | RecordError]:
        """Paint each job, in order; a job that fails yields its error instead.

        Jobs that follow each other and have one size run as one batch. A batch too large for the device's
        memory is run one by one.
        """
        for group in _same_size(jobs, self.settings):
            try:
                made: list[Pixels | RecordError] = list(self._run(group))
            except (MemoryError, RuntimeError) as error:
                if not no_memory(error):
                    raise
                made = self._singly(group)
            yield from made

    def _singly(self, group: Sequence[Painting]) -> list[Pixels | RecordError]:
        made: list[Pixels | RecordError] = []
        for job in group:
            try:
                made += self._run([job])
            except (MemoryError, RuntimeError) as error:
                if not no_memory(error):
                    raise
                height, width = job.image.shape[:2]
                made.append(RecordError(f"not enough memory to paint {width} x {height} pixels: {_SMALLER}"))
        return made

    def _run(self, group: Sequence[Painting]) -> list[Pixels | RecordError]:
        import torch

        height, width = group[0].image.shape[:2]
        width, height = working_size(width, height, self.settings.longest_side)
        inputs = [_prepared(job, width, height) for job in group]
        output = self._pipeline(
            prompt=[job.prompt for job in group],
            negative_prompt=[self.settings.negative_prompt] * len(group),
            image=[image for image, _ in inputs],
            mask_image=[mask for _, mask in inputs],
            height=height,
            width=width,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in group],
        )
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(group)
        return [
            RecordError("the checkpoint's safety checker blanked the image")
            if flag
            else self._back(job, made)
            for job, made, flag in zip(group, output.images, flags, strict=True)
        ]

    def _back(self, job: Painting, made: Image.Image) -> Pixels:
        """Resize a painting to the image's size, and restore the clean pixels outside the mask."""
        size = job.image.shape[1], job.image.shape[0]
        painted = np.asarray(made.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        if not self.settings.composite:
            return painted.copy()
        result = job.image.copy()
        here = job.region.window.slices
        clean, alpha = job.image[here].astype(np.float32), job.region.alpha[..., None]
        mixed = clean + (painted[here].astype(np.float32) - clean) * alpha
        result[here] = mixed.round().clip(0, 255).astype(np.uint8)
        return result


_SMALLER = "lower --longest_side, or use --offload"


def working_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height to paint at: at most `longest`, rounded down to multiples of 8."""
    scale = min(1.0, longest / max(width, height))
    return max(8, int(width * scale) // 8 * 8), max(8, int(height * scale) // 8 * 8)


def _prepared(job: Painting, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """The image with its masked pixels blanked, and the mask, at working size."""
    full = np.zeros(job.image.shape[:2], np.uint8)
    full[job.region.window.slices] = np.where(job.region.alpha > 0, 255, 0)
    image = cv2.resize(job.image, (width, height), interpolation=cv2.INTER_AREA).copy()
    mask = cv2.resize(full, (width, height), interpolation=cv2.INTER_NEAREST)
    image[mask > 0] = 0
    return Image.fromarray(image), Image.fromarray(mask)


def _same_size(jobs: Sequence[Painting], settings: InpaintSettings) -> Iterator[list[Painting]]:
    group: list[Painting] = []
    for job in jobs:
        if group and (len(group) == settings.batch or job.image.shape != group[0].image.shape):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def _device(asked: str) -> str:
    import torch

    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(settings: InpaintSettings, device: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise HonesError("the inpaint editor needs diffusers: pip install 'hones-eval[edit]'") from None
    import torch

    on_cpu = torch.device(device).type == "cpu"
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if on_cpu else "float16")
    try:
        pipeline: Any = diffusers.AutoPipelineForInpainting.from_pretrained(
            settings.checkpoint, torch_dtype=getattr(torch, dtype), trust_remote_code=False
        )
        pipeline.set_progress_bar_config(disable=True)
        if settings.offload and device != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
            return pipeline
        return pipeline.to(device)
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        raise HonesError(
            f"not enough memory on {device} for {settings.checkpoint}: use --offload or a smaller --dtype"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HonesError(
            f"{settings.checkpoint} cannot be loaded as a diffusers inpainting checkpoint: {reason}"
        ) from error
