"""Train the small VLM from a seed: `python -m hones_eval.toy.train --out DIR --seed 0`.

Three parts: the image tower learns to see (`sight.py`); then the decoder learns to read the image tokens,
each picture with long answers about its cells and shapes; then the mixture of all tasks. Sparse questions alone
leave the binding of colour to shape at a plateau for thousands of steps.
"""

import csv
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hones_eval.toy import model as small
from hones_eval.toy.packing import Batch, Packer, answer_logits
from hones_eval.toy.scenes import scene
from hones_eval.toy.sight import teach_sight

# How often each topic is asked for, in the first and in the second part.
DENSE = {
    "caption": 1.0, "ocr": 1.0, "shape_at": 1.0, "color": 2.0, "texture": 1.0, "size": 0.5,
    "exists": 1.0, "is_color": 1.0, "is_side": 1.0, "what_side": 0.5, "grounding": 1.0, "retrieval": 0.5,
}  # fmt: skip
MIXED = {
    "caption": 1.5, "ocr": 0.7, "shape_at": 0.5, "color": 1.5, "texture": 0.7, "size": 0.3, "is_texture": 0.7,
    "exists": 1.0, "is_color": 1.0, "is_side": 2.0, "what_side": 1.0, "grounding": 1.5, "retrieval": 3.0,
}  # fmt: skip
TOPICS = ("describe", "inventory", *MIXED)
_PICTURES = 5_000_000  # of the training split; the image tower alone learns from the rest


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults reproduce the shipped checkpoint."""

    out: Path = Path("runs/toy")
    seed: int = 0
    sight_steps: int = 1500  # of the image tower alone, 64 pictures each
    sight_rate: float = 2e-3
    steps: int = 3000  # of the whole model
    tokens: int = 2048  # a step
    rate: float = 1.5e-3
    warmup: int = 200
    dense_share: float = 0.3  # of the steps that ask for description and inventory of every picture
    width: int = 128  # tokens a picture, for four or so questions
    log_every: int = 100
    measure_every: int = 500
    measured_pictures: int = 256  # of the development split
    start: Path | None = None  # a checkpoint to go on from, with a fresh optimizer


def train(settings: Settings) -> Path:
    """Train, log and save; returns the folder of the checkpoint. One thread, no accelerator needed."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    processor, model = small.build_processor(), small.build_model(settings.seed)
    if settings.start is not None:
        model = LlavaForConditionalGeneration.from_pretrained(settings.start)
    else:
        blindness = teach_sight(model, settings.seed, settings.sight_steps, 64, settings.sight_rate)
        print(f"the image tower sees, loss {blindness:.3f}", flush=True)
    packer, rng = Packer(processor), random.Random(f"training/{settings.seed}")
    optimizer = _optimizer(model, settings)
    schedule = _schedule(optimizer, settings)
    log = _Log(settings.out / "training_log.csv")
    started, running = time.monotonic(), 0.0
    for step in range(1, settings.steps + 1):
        dense = step <= settings.dense_share * settings.steps
        loss = _loss(model, _batch(packer, settings, step, dense, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item() / settings.log_every
        if step % settings.measure_every == 0 or step == settings.steps:
            log.write(
                step, time.monotonic() - started, running, accuracy(model, packer, settings.measured_pictures)
            )
            save(model, processor, settings.out / "checkpoint")
        elif step % settings.log_every == 0:
            log.write(step, time.monotonic() - started, running, {})
        running = 0.0 if step % settings.log_every == 0 else running
    return settings.out / "checkpoint"


def accuracy(model: LlavaForConditionalGeneration, packer: Packer, pictures: int) -> dict[str, float]:
    """Share of development exchanges of each topic that greedy decoding would answer word for word.

    Told by one pass along the right answer: decoding reproduces it if and only if every arg-max agrees.
    """
    right: dict[str, list[bool]] = {topic: [] for topic in TOPICS}
    rng = random.Random("development")
    model.eval()
    for start in range(0, pictures, 32):
        wishes = [rng.sample(TOPICS, len(TOPICS)) for _ in range(32)]
        batch = packer.pack([scene("development", i) for i in range(start, start + 32)], wishes, rng)
        for topic, verdict in _verdicts(model, batch):
            right[topic].append(verdict)
    model.train()
    return {topic: sum(verdicts) / len(verdicts) for topic, verdicts in right.items()}


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the model and all that stock loaders want with it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _batch(packer: Packer, settings: Settings, step: int, dense: bool, rng: random.Random) -> Batch:
    table = DENSE if dense else MIXED
    pictures = settings.tokens // settings.width
    first = (settings.seed * settings.steps + step) * pictures % _PICTURES
    wishes = []
    for _ in range(pictures):
        long = ["describe"] * (dense or rng.random() < 0.1) + ["inventory"] * (dense or rng.random() < 0.25)
        asked = rng.choices(list(table), list(table.values()), k=12)
        wishes.append(long + asked)
    return packer.pack([scene("train", first + i) for i in range(pictures)], wishes, rng, settings.width)


def _loss(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of answer tokens; a long answer counts with the root of its length."""
    logits, places = answer_logits(model, batch)
    each = torch.nn.functional.cross_entropy(logits, batch.labels[places], reduction="none")
    weights = batch.weights[places]
    return (each * weights).sum() / weights.sum()


@torch.no_grad()
def _verdicts(model: LlavaForConditionalGeneration, batch: Batch) -> list[tuple[str, bool]]:
    logits, places = answer_logits(model, batch)
    agrees = torch.ones_like(places)
    agrees[places] = logits.argmax(-1) == batch.labels[places]
    return [
        (topic, bool(agrees[row][batch.owner[row] == k + 1].all()))
        for row, topics in enumerate(batch.topics)
        for k, topic in enumerate(topics)
    ]


def _optimizer(model: LlavaForConditionalGeneration, settings: Settings) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))


def _schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LRScheduler:
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=settings.warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, settings.steps - settings.warmup, eta_min=settings.rate / 50
    )
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [settings.warmup])


class _Log:
    """A CSV with a line a measurement: step, seconds, loss and the accuracy of every topic."""

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
