"""Learning scales with Lightning's `fit`, on one device or on several with the same steps."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from hones_eval.core.sites import Neuron
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.methods.learning import AnswerLoss, LearnedScales, cosine, frozen
from hones_eval.runs.checkpoint import Progress
from hones_eval.runs.lightning import Loop, one_fails_all_fail

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


@dataclass(frozen=True)
class FitSettings:
    """How scales are learned; the defaults are the paper's (HONES 4)."""

    beta: float = 0.05
    penalty: float = 1e-5
    learning_rate: float = 5e-4
    epochs: int = 2
    accumulate: int = 4
    clip_norm: float = 1.0
    limit: float = 1.5
    seed: int = 0


class Fitted(NamedTuple):
    """Learned scales [L, I], and the settings and losses to record with them."""

    scales: Tensor
    report: dict[str, Any]


def fit(
    replayer: Replayer, examples: TaskExamples, bank: Sequence[Neuron], settings: FitSettings, loop: Loop
) -> Fitted:
    """Learn one scale for every neuron of a bank; every rank gets the same.

    Raises: HonesError when steps cannot be shared evenly by the processes, or a loss is not finite.
    """
    if settings.epochs < 1 or settings.accumulate < 1:
        raise HonesError("learning scales takes at least one epoch and steps of at least one example")
    if settings.learning_rate <= 0 or settings.beta < 0:
        raise HonesError(
            f"learning scales takes a learning rate above 0 and a beta of 0 or more, not "
            f"{settings.learning_rate:g} and {settings.beta:g}"
        )
    if settings.accumulate % loop.world_size:
        raise HonesError(
            f"steps of {settings.accumulate} examples cannot be shared by {loop.world_size} processes: "
            f"use a number of --devices that divides {settings.accumulate}"
        )
    scales = LearnedScales(replayer.anatomy, bank)
    loss = AnswerLoss(scales, _decoder(replayer, examples), settings.beta, settings.penalty)
    module = _Fit(loss, examples, settings, loop)
    trainer = _trainer(settings, loop, replayer.anatomy.unembedding.is_cuda)
    with frozen(replayer.anatomy.model), one_fails_all_fail(trainer):
        trainer.fit(module)
    steps = module.steps_before + trainer.global_step
    if steps != module.steps:
        raise HonesError(f"learning took {steps} steps where {module.steps} were planned")
    found = scales.scales()
    report = asdict(settings) | {"steps": steps, "last_learning_rate": module.last_rate()}
    report |= {"epoch_losses": module.history, "largest_change": float((found - 1).abs().max())}
    return Fitted(found, report)


def _decoder(replayer: Replayer, examples: TaskExamples) -> Decoder:
    """A decoder that knows what type id an answer's tokens have, in the families that have types."""
    decoder, first = Decoder(replayer), examples[0]
    decoder.learn_type(first.inputs, first.settings)
    return decoder


def _trainer(settings: FitSettings, loop: Loop, cuda: bool) -> Trainer:
    """On the devices of the loop."""
    return Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=loop.trainer.num_devices,
        num_nodes=loop.trainer.num_nodes,
        strategy=loop.strategy(),
        use_distributed_sampler=False,
        max_epochs=1,  # the epochs of the settings follow each other in one loader
        accumulate_grad_batches=settings.accumulate // loop.world_size,
        gradient_clip_val=settings.clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=loop.trainer.progress_bar_callback is not None,
    )


class Slot(NamedTuple):
    """A place in a step: an example and its weight, or nothing where the last step has fewer examples."""

    example: Example | None
    weight: float


class Slots(Dataset[Slot]):
    """One rank's share of one epoch, cut into steps of exactly `accumulate` places over all ranks.

    The last step may have fewer examples than places. It is padded with empty ones, and the others' weights
    make the step the mean over its examples, as every other step is.
    """

    def __init__(
        self, examples: TaskExamples, order: Sequence[int], accumulate: int, rank: int = 0, world: int = 1
    ) -> None:
        """Share out `order`, the epoch's order of the examples."""
        self.examples = examples
        self.places: list[tuple[int | None, float]] = []
        for start in range(0, len(order), accumulate):
            step = list(order[start : start + accumulate])
            weight = accumulate / len(step)
            padded = [*((index, weight) for index in step), *[(None, 0.0)] * (accumulate - len(step))]
            self.places += padded[rank::world]

    def __len__(self) -> int:
        """The number of places."""
        return len(self.places)

    def __getitem__(self, place: int) -> Slot:
        """Record the example of a place."""
        index, weight = self.places[place]
        return Slot(None if index is None else self.examples[index], weight)


class _Fit(LightningModule):  # type: ignore[misc]
    """Steps of AdamW on `a` alone; the model is no part of this module, so Lightning leaves it alone.

    After a step, `a`, the optimizer's moments and the losses are what a killed run goes on from.
    """

    def __init__(self, loss: AnswerLoss, examples: TaskExamples, settings: FitSettings, loop: Loop) -> None:
        super().__init__()
        self.scales = loss.scales
        self.loss, self.examples, self.settings, self.partial = loss, examples, settings, loop.partial
        self.places_a_step = settings.accumulate // loop.world_size  # of this rank
        self.steps_an_epoch = math.ceil(len(examples) / settings.accumulate)
        self.steps = settings.epochs * self.steps_an_epoch
        self.history: list[dict[str, float]] = []
        self.losses = torch.zeros(settings.epochs, 3, dtype=torch.float64)
        self.done = 0
        self._left: Progress | None = None

    @property
    def steps_before(self) -> int:
        """How many steps a killed run had made."""
        return 0 if self._left is None else self._left.done // self.places_a_step

    def setup(self, stage: str) -> None:
        self._left = None if self.partial is None else self.partial.load(*self._place)
        if self._left is not None:
            self.done = self._left.done
            self.losses = self._left.sums["losses"]
            self.scales.a.data.copy_(self._left.sums["a"])

    def configure_optimizers(self) -> dict[str, Any]:
        # The penalty on `a` is in the loss, so AdamW's own decay is off.
        optimizer = torch.optim.AdamW([self.scales.a], lr=self.settings.learning_rate, weight_decay=0.0)
        if self._left is not None:
            kept = {name: self._left.sums[name].clone() for name in MOMENTS}
            device = self.scales.a.device
            moved = {name: value if name == "step" else value.to(device) for name, value in kept.items()}
            optimizer.state[self.scales.a] = moved
        rate, before = cosine(self.steps), self.steps_before
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(before + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Slot]:
        epochs = []
        for epoch in range(self.settings.epochs):
            generator = torch.Generator().manual_seed(self.settings.seed + epoch)
            order = torch.randperm(len(self.examples), generator=generator).tolist()
            rank, world = self.global_rank, self.trainer.world_size
            epochs.append(Slots(self.examples, order, self.settings.accumulate, rank, world))
        places = ConcatDataset[Slot](epochs)
        return DataLoader(Subset(places, range(self.done, len(places))), batch_size=None, shuffle=False)

    def transfer_batch_to_device(self, batch: Slot, device: torch.device, dataloader_idx: int) -> Slot:
        return batch  # the wrapper has already put the inputs where its model wants them

    def training_step(self, batch: Slot, batch_idx: int) -> Tensor:
        epoch = self.done // (self.steps_an_epoch * self.places_a_step)
        self.done += 1
        if batch.example is None:
            return self.scales.a.sum() * 0
        loss = self.loss(batch.example)
        self.losses[epoch] += torch.tensor([float(loss.cross_entropy), float(loss.divergence), 1.0])
        return loss.total * batch.weight

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.scales.a.clamp_(-self.settings.limit, self.settings.limit)
        # Of the last step nothing is kept, so that a run that goes on always has a step to make.
        if self.partial is not None and self.done < self.steps * self.places_a_step:
            state = self.optimizers().optimizer.state[self.scales.a]
            sums = {name: state[name] for name in MOMENTS}
            sums |= {"a": self.scales.a.detach(), "losses": self.losses}
            self.partial.save(*self._place, Progress(self.done, sums, {}), last=False)

    def on_train_epoch_end(self) -> None:
        together = self.all_gather(self.losses.to(self.device)).reshape(-1, *self.losses.shape).sum(0)
        self.history = [
            {"cross_entropy": entropy / count, "divergence": divergence / count}
            for entropy, divergence, count in together.tolist()
        ]

    def last_rate(self) -> float:
        """The learning rate at which the schedule has arrived."""
        (rate,) = self.lr_schedulers().get_last_lr()
        return float(rate)

    @property
    def _place(self) -> tuple[str, int, int]:
        return f"learn-{self.examples.task}", self.global_rank, self.trainer.world_size
