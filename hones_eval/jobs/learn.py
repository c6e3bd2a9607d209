"""Learn scales with Lightning's `fit`, taking the same steps on one device or on several."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from hones_eval.core.sites import Head, Neuron
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.methods.learning import AnswerLoss, Learned, LearnedScales, cosine, frozen
from hones_eval.runs.checkpoint import Progress
from hones_eval.runs.lightning import Loop, Meeting, from_all, one_fails_all_fail
from hones_eval.runs.progress import ProgressLines

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the state that AdamW keeps per parameter


@dataclass(frozen=True)
class FitSettings:
    """The settings of learning; the defaults are the paper's (HONES 4)."""

    beta: float = 0.05
    penalty: float = 1e-5
    learning_rate: float = 5e-4
    epochs: int = 2
    accumulate: int = 4
    clip_norm: float = 1.0
    limit: float = 1.5
    seed: int = 0
    floor: float | None = None
    """The smallest `a`, where it is not `-limit`: a floor of -1 keeps every scale at 0 or more."""
    sparsity: float = 0.0
    """After every step `a` shrinks towards 0 by this share of the learning rate (a proximal L1 penalty).

    AdamW moves a parameter by about the learning rate times its mean gradient over its typical gradient. So
    a site stays at exactly 1 unless its mean gradient is more than this share of the typical one: the
    penalty has no unit, and means the same for every model and task.
    """

    with_end: bool = False
    """Whether the end of a generated answer counts as one more token of it."""

    def recorded(self) -> dict[str, Any]:
        """The settings as an artifact records them: `floor` and `sparsity` only where they are used."""
        unused = [name for name in ("floor", "sparsity", "with_end") if not getattr(self, name)]
        return {name: value for name, value in asdict(self).items() if name not in unused}


class Fitted(NamedTuple):
    """Learned scales and shifts, with the settings and losses to record.

    `epochs` holds those at the end of every epoch.
    """

    learned: Learned
    report: dict[str, Any]
    epochs: list[Learned]


def fit(
    replayer: Replayer,
    examples: TaskExamples,
    bank: Sequence[Head | Neuron],
    settings: FitSettings,
    loop: Loop,
    indices: Sequence[int] | None = None,
    name: str = "learn",
    units: Tensor | None = None,
) -> Fitted:
    """Learn one scale per site of a bank, and its shift if asked for; every process gets the same.

    Args:
        replayer: the model.
        examples: the development examples.
        bank: the heads and neurons that get a scale.
        settings: of the optimizer and the loss.
        loop: the processes to learn on.
        indices: the examples to learn from; by default all.
        name: of this run in the checkpoint folder.
        units: to learn shifts too, the unit of each site's shift, [bank]; `limit` and `sparsity` are in it.

    Raises: HonesError when the processes cannot share the steps evenly, or a loss is not finite.
    """
    if settings.epochs < 1 or settings.accumulate < 1:
        raise HonesError("learning scales needs at least one epoch, and at least one example per step")
    if settings.learning_rate <= 0 or settings.beta < 0:
        raise HonesError(
            f"--learning_rate {settings.learning_rate:g} --beta {settings.beta:g}: learning "
            "scales needs a learning rate above 0 and a beta of 0 or more"
        )
    if settings.accumulate % loop.world_size:
        raise HonesError(
            f"{loop.world_size} processes cannot share steps of {settings.accumulate} examples evenly: "
            f"give a number of --devices that divides {settings.accumulate}"
        )
    scales = LearnedScales(replayer.anatomy, bank, units)
    loss = AnswerLoss(
        scales, _decoder(replayer, examples), settings.beta, settings.penalty, settings.with_end
    )
    chosen = range(len(examples)) if indices is None else indices
    module = _Fit(loss, examples, settings, loop, chosen, name)
    trainer = _trainer(settings, loop, replayer.anatomy.device.type == "cuda")
    with frozen(replayer.anatomy.model), one_fails_all_fail(trainer):
        trainer.fit(module)
    steps = module.steps_before + trainer.global_step
    if steps != module.steps:
        raise HonesError(f"learning made {steps} steps instead of {module.steps}; please report this")
    report = settings.recorded() | {"steps": steps, "last_learning_rate": module.last_rate()}
    largest = float(scales.a.detach().abs().max())
    report |= {"epoch_losses": module.history, "largest_change": largest}
    return Fitted(scales.learned(), report, module.learned_by_epoch())


def _decoder(replayer: Replayer, examples: TaskExamples) -> Decoder:
    """A decoder that has learned the token type id of an answer's tokens, for families with token types."""
    decoder, first = Decoder(replayer), examples[0]
    decoder.learn_type(first.inputs, first.settings)
    return decoder


def _trainer(settings: FitSettings, loop: Loop, cuda: bool) -> Trainer:
    """A trainer on the same devices as the loop."""
    return Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=loop.trainer.num_devices,
        num_nodes=loop.trainer.num_nodes,
        strategy=loop.strategy(),
        use_distributed_sampler=False,
        max_epochs=1,  # one loader holds all epochs, one after the other
        accumulate_grad_batches=settings.accumulate // loop.world_size,
        gradient_clip_val=settings.clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=loop.trainer.progress_bar_callback is not None,
        callbacks=[
            callback for callback in loop.trainer.callbacks if isinstance(callback, ProgressLines | Meeting)
        ],
    )


class Slot(NamedTuple):
    """A slot of a step: an example and its weight, or no example where the last step has fewer."""

    example: Example | None
    weight: float


class Slots(Dataset[Slot]):
    """One process's share of an epoch, cut into steps of exactly `accumulate` slots over all processes.

    The last step may have fewer examples than slots. It is then padded with empty slots, and its examples
    are weighted so that its loss is the mean over its examples, as in every other step.
    """

    def __init__(
        self, examples: TaskExamples, order: Sequence[int], accumulate: int, rank: int = 0, world: int = 1
    ) -> None:
        """Take this process's slots of `order`, the order of the examples in this epoch."""
        self.examples = examples
        self.slots: list[tuple[int | None, float]] = []
        for start in range(0, len(order), accumulate):
            step = list(order[start : start + accumulate])
            weight = accumulate / len(step)
            padded = [*((index, weight) for index in step), *[(None, 0.0)] * (accumulate - len(step))]
            self.slots += padded[rank::world]

    def __len__(self) -> int:
        """The number of slots."""
        return len(self.slots)

    def __getitem__(self, number: int) -> Slot:
        """The slot with this number; its example is recorded now."""
        index, weight = self.slots[number]
        return Slot(None if index is None else self.examples[index], weight)


class _Fit(LightningModule):  # type: ignore[misc]
    """Makes AdamW steps on `a` alone; the model is not part of this module, so Lightning does not touch it.

    To resume a killed run, each step saves `a`, the optimizer's moments and the sums of the losses. After a
    step these are the same on every process. But the last file that a process wrote before it was killed may
    be a step older than that of another one, so all of them continue from the newest file.
    """

    def __init__(
        self,
        loss: AnswerLoss,
        examples: TaskExamples,
        settings: FitSettings,
        loop: Loop,
        indices: Sequence[int],
        name: str,
    ) -> None:
        super().__init__()
        self.indices, self.name = list(indices), name
        self.scales = loss.scales
        self.loss, self.examples, self.settings, self.partial = loss, examples, settings, loop.partial
        self.slots_per_step = settings.accumulate // loop.world_size  # of this process
        self.steps_per_epoch = math.ceil(len(indices) / settings.accumulate)
        self.steps = settings.epochs * self.steps_per_epoch
        self.history: list[dict[str, float]] = []
        self.losses = torch.zeros(settings.epochs, 3, dtype=torch.float64)
        """Sums over this process's examples since the start, by epoch."""
        self.losses_before = torch.zeros_like(self.losses)
        """Sums over the examples of all processes, before a resume."""
        self.snapshots = torch.zeros(settings.epochs, len(loss.scales.a))
        self.done = 0
        self._resumed: Progress | None = None

    @property
    def steps_before(self) -> int:
        """The number of steps that a resumed run had already made."""
        return 0 if self._resumed is None else self._resumed.done // self.slots_per_step

    def setup(self, stage: str) -> None:
        own = None if self.partial is None else self.partial.load(*self._checkpoint)
        found = [progress for progress in from_all(own) if progress is not None]
        self._resumed = max(found, key=lambda progress: progress.done, default=None)
        if self._resumed is not None:
            self.done = self._resumed.done
            self.losses_before = self._resumed.sums["losses"]
            self.snapshots = self._resumed.sums["snapshots"]
            self.scales.a.data.copy_(self._resumed.sums["a"])

    def configure_optimizers(self) -> dict[str, Any]:
        # The loss already holds the penalty on `a`, so AdamW's weight decay is off.
        optimizer = torch.optim.AdamW([self.scales.a], lr=self.settings.learning_rate, weight_decay=0.0)
        if self._resumed is not None:
            kept = {name: self._resumed.sums[name].clone() for name in MOMENTS}
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
            drawn = torch.randperm(len(self.indices), generator=generator).tolist()
            order = [self.indices[place] for place in drawn]
            rank, world = self.global_rank, self.trainer.world_size
            epochs.append(Slots(self.examples, order, self.settings.accumulate, rank, world))
        slots = ConcatDataset[Slot](epochs)
        return DataLoader(Subset(slots, range(self.done, len(slots))), batch_size=None, shuffle=False)

    def transfer_batch_to_device(self, batch: Slot, device: torch.device, dataloader_idx: int) -> Slot:
        return batch  # the wrapper has already moved the inputs to its model's device

    def training_step(self, batch: Slot, batch_idx: int) -> Tensor:
        epoch = self.done // (self.steps_per_epoch * self.slots_per_step)
        self.done += 1
        if batch.example is None:
            return self.scales.a.sum() * 0
        loss = self.loss(batch.example)
        self.losses[epoch] += torch.tensor([float(loss.cross_entropy), float(loss.divergence), 1.0])
        return loss.total * batch.weight

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        rate = self.optimizers().optimizer.param_groups[0]["lr"]
        floor = -self.settings.limit if self.settings.floor is None else self.settings.floor
        with torch.no_grad():
            a = self.scales.a
            if self.settings.sparsity:
                a.copy_(a.sign() * (a.abs() - rate * self.settings.sparsity).clamp(min=0))
        self.scales.clamp_(floor, self.settings.limit)
        epoch, left = divmod(self.done, self.steps_per_epoch * self.slots_per_step)
        if not left:
            self.snapshots[epoch - 1] = self.scales.a.detach().cpu()
        # The last step is not saved: a resumed run must have at least one step to make.
        if self.partial is not None and self.done < self.steps * self.slots_per_step:
            state = self.optimizers().optimizer.state[self.scales.a]
            sums = {name: state[name] for name in MOMENTS}
            sums |= {"a": self.scales.a.detach(), "losses": self._all_losses(), "snapshots": self.snapshots}
            self.partial.save(*self._checkpoint, Progress(self.done, sums, {}), last=False)

    def on_train_epoch_end(self) -> None:
        self.history = [
            {"cross_entropy": entropy / count, "divergence": divergence / count}
            for entropy, divergence, count in self._all_losses().tolist()
        ]

    def _all_losses(self) -> Tensor:
        """The sums of the losses [epochs, 3] over the examples of all processes, which all call this."""
        gathered = self.all_gather(self.losses.to(self.device)).reshape(-1, *self.losses.shape)
        total: Tensor = self.losses_before + gathered.sum(0).cpu()
        return total

    def learned_by_epoch(self) -> list[Learned]:
        """The scales and shifts at the end of every epoch."""
        last, found = self.scales.a.detach().clone(), []
        for snapshot in self.snapshots:
            self.scales.a.data.copy_(snapshot)
            found.append(self.scales.learned())
        self.scales.a.data.copy_(last)
        return found

    def last_rate(self) -> float:
        """The learning rate at the end of the schedule."""
        (rate,) = self.lr_schedulers().get_last_lr()
        return float(rate)

    @property
    def _checkpoint(self) -> tuple[str, int, int]:
        return f"{self.name}-{self.examples.task}", self.global_rank, self.trainer.world_size
