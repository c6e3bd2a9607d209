"""Train the toy model from a seed: `python -m hones_eval.toy.train --out DIR --seed 0`.

First the image tower is pretrained (`sight.py`). Then the decoder learns to look up image tokens by
position and by content, from long answers about the cells and shapes of each image. Then it trains on all
tasks, and finally on mostly yes/no questions. With short questions alone, accuracy stays at chance for
thousands of steps.
"""

import csv
import random
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hones_eval.toy import model as small
from hones_eval.toy.packing import Batch, Packer, answer_logits, answer_loss, verdicts
from hones_eval.toy.scenes import scene
from hones_eval.toy.sight import teach_sight

# How often each topic is asked for: while the decoder learns to look, to answer, and to judge.
LOOKING = {
    "caption": 1.0, "ocr": 1.0, "shape_at": 1.0, "color": 2.0, "texture": 1.0, "size": 0.5,
    "exists": 1.0, "is_color": 1.0, "is_side": 1.0, "what_side": 0.5, "grounding": 1.0, "retrieval": 0.5,
}  # fmt: skip
ANSWERING = {
    "caption": 1.5, "ocr": 0.7, "shape_at": 0.5, "color": 1.5, "texture": 0.7, "size": 0.3, "is_texture": 0.7,
    "exists": 1.0, "is_color": 1.0, "is_side": 2.0, "what_side": 1.0, "grounding": 1.5, "retrieval": 3.0,
}  # fmt: skip
JUDGING = {
    "exists": 2.5, "is_color": 2.5, "is_texture": 1.0, "is_side": 3.0, "retrieval": 2.5, "ocr": 1.5,
    "shape_at": 0.4, "what_side": 0.7, "color": 0.5, "texture": 0.4, "size": 0.2, "caption": 0.5,
    "grounding": 0.6,
}  # fmt: skip
TOPICS = ("describe", "inventory", *ANSWERING)
_IMAGES = 5_000_000  # of the training split; the image tower alone learns from the rest


class Part(NamedTuple):
    """A phase of training: shares of images with the two long answers, mixture, tokens per image."""

    steps: int
    described: float
    listed: float
    mixture: dict[str, float]
    width: int


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults reproduce the shipped checkpoint."""

    out: Path = Path("runs/toy")
    seed: int = 0
    sight_steps: int = 1500  # of the image tower alone, 64 images each
    sight_rate: float = 2e-3
    cells_steps: int = 500  # of the whole model, with a description of every image's cells
    shapes_steps: int = 600  # with an inventory of every image's shapes
    mixed_steps: int = 2000  # with short questions of all kinds
    rate: float = 1.5e-3
    judging_steps: int = 2500  # mostly yes/no questions, after a restart of the optimizer
    judging_rate: float = 1e-3
    tokens: int = 2304  # a step
    warmup: int = 200
    log_every: int = 100
    measure_every: int = 500
    measured_images: int = 256  # of the development split
    start: Path | None = None  # a checkpoint of the first round, to run the second one alone


def train(settings: Settings) -> Path:
    """Train, log and save; returns the folder of the checkpoint. One thread, no accelerator needed."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    run = _Run(settings)
    if settings.start is None:
        sight_loss = teach_sight(run.model, settings.seed, settings.sight_steps, 64, settings.sight_rate)
        print(f"pretrained the image tower, loss {sight_loss:.3f}", flush=True)
        run.round("training", run.first_round, settings.rate)
    judging = Part(settings.judging_steps, 0.15, 0.1, JUDGING, 192)
    run.step = sum(part.steps for part in run.first_round)
    run.round("judging", [judging], settings.judging_rate)
    return settings.out / "checkpoint"


class _Run:
    """A running training: the model, its progress and its log."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.processor, self.model = small.build_processor(), small.build_model(settings.seed)
        if settings.start is not None:
            self.model = LlavaForConditionalGeneration.from_pretrained(settings.start)
        self.packer, self.log = Packer(self.processor), _Log(settings.out / "training_log.csv")
        self.step, self.started = 0, time.monotonic()
        self.first_round = [
            Part(settings.cells_steps, 1.0, 0.0, LOOKING, 96),
            Part(settings.shapes_steps, 0.3, 1.0, LOOKING, 96),
            Part(settings.mixed_steps, 0.1, 0.3, ANSWERING, 144),
        ]
        self.last = sum(part.steps for part in self.first_round) + settings.judging_steps

    def round(self, name: str, parts: list[Part], rate: float) -> None:
        """Train some phases with one optimizer, warm-up and cosine schedule; save at the end."""
        rng, losses = random.Random(f"{name}/{self.settings.seed}"), list[float]()
        optimizer = _optimizer(self.model, rate)
        schedule = _schedule(optimizer, rate, self.settings.warmup, sum(part.steps for part in parts))
        for part in chain.from_iterable([item] * item.steps for item in parts):
            self.step += 1
            batch = self._batch(part, rng)
            loss = answer_loss(*answer_logits(self.model, batch), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            self._report(losses)
        save(self.model, self.processor, self.settings.out / "checkpoint")

    def _report(self, losses: list[float]) -> None:
        measure = self.step % self.settings.measure_every == 0 or self.step == self.last
        if not measure and self.step % self.settings.log_every:
            return
        measured = accuracy(self.model, self.packer, self.settings.measured_images) if measure else {}
        self.log.write(self.step, time.monotonic() - self.started, sum(losses) / len(losses), measured)
        losses.clear()
        if measure:
            save(self.model, self.processor, self.settings.out / "checkpoint")

    def _batch(self, part: Part, rng: random.Random) -> Batch:
        images = self.settings.tokens // part.width
        first = (self.settings.seed * 10_000 + self.step) * images % _IMAGES
        wishes = []
        for _ in range(images):
            long = ["describe"] * (rng.random() < part.described) + ["inventory"] * (
                rng.random() < part.listed
            )
            wishes.append(long + rng.choices(list(part.mixture), list(part.mixture.values()), k=8))
        return self.packer.pack([scene("train", first + i) for i in range(images)], wishes, rng, part.width)


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, packer: Packer, images: int) -> dict[str, float]:
    """Share of development questions of each topic that greedy decoding would answer word for word."""
    right: dict[str, list[bool]] = {topic: [] for topic in TOPICS}
    rng = random.Random("development")
    model.eval()
    for start in range(0, images, 32):
        wishes = [rng.sample(TOPICS, len(TOPICS)) for _ in range(32)]
        batch = packer.pack([scene("development", i) for i in range(start, start + 32)], wishes, rng)
        for topic, verdict in verdicts(*answer_logits(model, batch), batch):
            right[topic].append(verdict)
    model.train()
    return {topic: sum(found) / len(found) for topic, found in right.items()}


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the model with everything that stock loaders need."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _optimizer(model: LlavaForConditionalGeneration, rate: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def _schedule(
    optimizer: torch.optim.Optimizer, rate: float, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warmup, 1), eta_min=rate / 50)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [warmup])


class _Log:
    """A CSV with one line per measurement: step, seconds, loss and the accuracy of every topic."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._append(["step", "seconds", "loss", *TOPICS], "w")

    def write(self, step: int, seconds: float, loss: float, measured: dict[str, float]) -> None:
        accuracies = [f"{measured[topic]:.4f}" if measured else "" for topic in TOPICS]
        self._append([str(step), f"{seconds:.0f}", f"{loss:.4f}", *accuracies], "a")

    def _append(self, row: list[str], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)


if __name__ == "__main__":
    from jsonargparse import CLI

    train(CLI(Settings))
