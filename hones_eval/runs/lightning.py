"""Predict loops over examples, run by Lightning on one device or several."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Subset
from torchmetrics import Metric

from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.checkpoint import Partial, Progress, stopped_on_request
from hones_eval.runs.measure import Measure, Staged, Totals
from hones_eval.runs.processes import (
    ended_ranks,
    ends_with_others,
    is_about_others,
    left_alone,
    meet_others,
    several,
)
from hones_eval.runs.progress import ProgressLines

# Lightning sets its own level when it is imported; its banners would hide the messages of a pass.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

# How long a process waits for the others at the end of a pass. After a resume, a process that had little left
# to do waits while another works on its whole share.
PATIENCE = timedelta(days=1)
TIME_TO_SAVE = 60.0
"""Seconds that the other processes have to end their example and to save, after a SIGTERM."""


class Loop:
    """Runs passes over examples; every example is measured once, by one of the processes."""

    def __init__(
        self,
        accelerator: Literal["cpu", "cuda"],
        devices: int = 1,
        num_nodes: int = 1,
        progress: bool = True,
    ) -> None:
        """Start nothing yet: processes are launched by the first pass.

        Args:
            accelerator: where the model is.
            devices: processes on this node, one device each.
            num_nodes: nodes; torchrun or srun starts the same command on each.
            progress: say what a pass costs and how far it is: by a bar on a terminal, elsewhere by lines.

        Raises: HonesError when there are not that many devices, or a launcher has started another number of
            processes, or none on other nodes.
        """
        _check_launch(devices, num_nodes)
        self.world_size = devices * num_nodes
        self.trainer = _trainer(
            accelerator="gpu" if accelerator == "cuda" else "cpu",
            devices=devices,
            num_nodes=num_nodes,
            strategy=self.strategy(),
            use_distributed_sampler=False,  # it repeats examples to even out ranks; ours does not
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress and sys.stderr.isatty(),
            callbacks=self._callbacks(progress),
            inference_mode=True,
            barebones=False,
        )
        self.partial: Partial | None = None

    @staticmethod
    def _callbacks(progress: bool) -> list[Callback]:
        if not progress:
            return [Meeting()]
        is_terminal = sys.stderr.isatty()
        return [Meeting(), ProgressLines(lines=not is_terminal), *([_Bar(leave=True)] if is_terminal else [])]

    def strategy(self) -> Any:
        """The `strategy` argument of a Lightning trainer on these processes."""
        return _Strategy(timeout=PATIENCE) if self.world_size > 1 else "auto"

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return bool(self.trainer.is_global_zero)

    def run(self, examples: TaskExamples, measure: Measure, name: str) -> Totals:
        """Measure every example once and add everything up; every rank gets the same totals.

        Raises: HonesError when there are fewer examples than processes, or one was not measured.
        """
        if len(examples) < self.world_size:
            raise HonesError(
                f"{len(examples)} examples cannot be shared by {self.world_size} processes: "
                "raise --limit or lower --devices"
            )
        module = _Pass(examples, measure, name, self.partial)
        with one_fails_all_fail(self.trainer):
            self.trainer.predict(module, return_predictions=False)
            # Not in a hook of Lightning: where nothing is left to measure, it calls none.
            module.add_inherited()
            sums = {key: value.cpu() for key, value in module.totals.compute().items()}
            records = _gather(module.records)
        missing = len(examples) - len(records)
        if missing:
            raise HonesError(f"{missing} of {len(examples)} examples were not measured in {name}")
        return Totals(sums, records)

    def run_in_stages(self, examples: TaskExamples, measure: Staged, name: str) -> Totals:
        """Measure stage after stage until `measure` has finished; every rank gets the same totals.

        Ranks share a stage and meet after it. Everything is added up in the order of the stages, so that
        the number of ranks changes no bit of the result.
        """
        module = _StagedPass(examples, measure, name, self.partial)
        with one_fails_all_fail(self.trainer):
            self.trainer.predict(module, return_predictions=False)
        return Totals({key: value.cpu() for key, value in module.totals.sums().items()}, module.records)


class Meeting(Callback):  # type: ignore[misc]
    """Lets the processes of a run exchange their process ids when their group has been made."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Exchange process ids."""
        meet_others()


class _Strategy(DDPStrategy):  # type: ignore[misc]
    """DDP whose launcher leaves it to `one_fails_all_fail` to notice a dead process.

    Lightning's own observer kills the first process by SIGKILL, before that can say which one has died.
    """

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class _Launcher(_SubprocessScriptLauncher):  # type: ignore[misc]
    def launch(self, function: Any, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """Signal the processes that this one started; before they are killed after a SIGTERM, let them save.

        Lightning has passed the SIGTERM on to them. A second one would end them at once.
        """
        if signum == signal.SIGKILL and stopped_on_request():
            until = time.monotonic() + TIME_TO_SAVE
            while any(started.poll() is None for started in self.procs) and time.monotonic() < until:
                time.sleep(0.1)
        super().kill(signum)


@contextmanager
def one_fails_all_fail(trainer: Trainer) -> Iterator[None]:
    """A block in which processes wait for each other; when one fails, the others stop instead of waiting.

    Raises: HonesError in the processes that stop; the failed process reports the reason.
    """

    def end_started() -> None:
        # Those that Lightning started itself end here; those of a launcher are ended by their launcher.
        if trainer.strategy.launcher is not None and hasattr(trainer.strategy.launcher, "procs"):
            trainer.strategy.launcher.kill(signal.SIGKILL)

    try:
        with ends_with_others(end_started) if trainer.world_size > 1 else nullcontext():
            yield
    except BaseException as error:
        end_started()
        if is_about_others(error):
            raise left_alone(error) from error
        raise


class SumOverRanks(Metric):  # type: ignore[misc]
    """Named sums of tensors, added up over all ranks when they are read."""

    full_state_update = False

    def __init__(self, zeros: dict[str, Tensor]) -> None:
        """One state for every name; states are float64 wherever the device has it."""
        super().__init__()
        self.names = list(zeros)
        for name, zero in zeros.items():
            self.add_state(name, default=zero, dist_reduce_fx="sum")
        self.update(zeros)  # a rank without examples has a sum too, which torchmetrics would warn of

    def update(self, sums: dict[str, Tensor]) -> None:
        """Add one example's sums."""
        for name in self.names:
            state = getattr(self, name)
            setattr(self, name, state + sums[name].to(state))

    def compute(self) -> dict[str, Tensor]:
        """The sums by name, over all ranks."""
        return self.sums()

    def sums(self) -> dict[str, Tensor]:
        """The sums by name, of this rank so far."""
        return {name: getattr(self, name) for name in self.names}


class _Pass(LightningModule):  # type: ignore[misc]
    """One pass of a measure over this rank's examples."""

    def __init__(self, examples: TaskExamples, measure: Measure, name: str, partial: Partial | None) -> None:
        super().__init__()
        self.examples = examples
        self.measure = measure
        self.name = name
        self.partial = partial
        self.totals = SumOverRanks(measure.zeros())
        self.records: dict[int, Any] = {}
        self.inherited: list[Progress] = []
        self.left = 0
        # A rank of a run that goes on may have measured all of its share when another has not.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[Example]:
        done: set[int] = set()
        if self.partial is not None:
            done = self._go_on(self.partial)
        mine = self.examples.share(self.global_rank, self.trainer.world_size)
        left = [index for index in mine if index not in done]
        self.left = len(left)
        # batch_size=None hands over examples one by one: heads, not examples, fill the batch.
        return DataLoader(Subset(self.examples, left), batch_size=None, shuffle=False)

    def predict_step(self, batch: Example, batch_idx: int) -> None:
        measured = self.measure.measure(batch)
        self.totals.update(measured.sums)
        self.records[batch.index] = measured.record
        self.left -= 1
        alone = ended_ranks()
        if self.partial is not None:
            progress = Progress(self.done, self.totals.sums(), self.records)
            self.partial.save(*self._place, progress, last=self.left == 0 or bool(alone))
        if alone:
            raise left_alone()

    @property
    def done(self) -> int:
        """How many examples this process has measured, before and after a resume."""
        return len(self.records)

    def add_inherited(self) -> None:
        """Add what was inherited. It is not part of this process's own file."""
        for progress in self.inherited:
            self.totals.update(progress.sums)
            self.records |= progress.records

    @property
    def _place(self) -> tuple[str, int, int]:
        return f"{self.name}-{self.examples.task}", self.global_rank, self.trainer.world_size

    def _go_on(self, partial: Partial) -> set[int]:
        """Continue from this process's own file, and from those of a run with another number of processes.

        Such a file is inherited by the first process that can read it: nodes need not share a disk. It stays
        as it is, so that a run that is killed again finds it again.

        Returns: the examples that are done.
        """
        own = partial.load(*self._place)
        if own is not None:
            self.totals.update(own.sums)
            self.records = dict(own.records)
        others = partial.load_others(*self._place)
        heirs: dict[str, int] = {}
        done = set(self.records)
        for rank, files in enumerate(from_all({name: list(of.records) for name, of in others.items()})):
            for name, indices in files.items():
                heirs.setdefault(name, rank)
                done.update(indices)
        self.inherited = [of for name, of in others.items() if heirs[name] == self.global_rank]
        return done

    def transfer_batch_to_device(self, batch: Example, device: torch.device, dataloader_idx: int) -> Example:
        return batch  # the wrapper has already put the inputs where its model wants them


class _StagedPass(LightningModule):  # type: ignore[misc]
    """One pass in stages; the first rank keeps what was measured so far, for all."""

    unit = "stages of examples"

    def __init__(self, examples: TaskExamples, measure: Staged, name: str, partial: Partial | None) -> None:
        super().__init__()
        self.examples = examples
        self.measure = measure
        self.name = name
        self.partial = partial
        self.totals = SumOverRanks(measure.zeros())
        self.records: dict[int, Any] = {}
        self.stages = measure.stages()
        self.done = 0

    def predict_dataloader(self) -> DataLoader[list[int]]:
        self._go_on()
        # Never empty, as Lightning refuses a loader that is; a finished pass passes over what is left.
        left: Any = self.stages[min(self.done, len(self.stages) - 1) :]
        return DataLoader(left, batch_size=None, shuffle=False)

    def predict_step(self, batch: list[int], batch_idx: int) -> None:
        if self.measure.finished:
            return
        mine = batch[self.global_rank :: self.trainer.world_size]
        measured = _gather({index: self.measure.measure(self.examples[index]) for index in mine})
        stage = [measured[index] for index in batch]
        for index, found in zip(batch, stage, strict=True):
            self.totals.update(found.sums)
            self.records[index] = found.record
        self.measure.look(stage)
        self.done += 1
        if self.partial is not None and self.global_rank == 0:
            sums = self.totals.sums() | {_STATE + key: value for key, value in self.measure.state().items()}
            progress = Progress(self.done, sums, self.records)
            self.partial.save(*self._place, progress, last=self.measure.finished)

    @property
    def _place(self) -> tuple[str, int, int]:
        # The same for any number of ranks: a run can go on with more of them, or with fewer.
        return f"{self.name}-{self.examples.task}", 0, 1

    def _go_on(self) -> None:
        found = None
        if self.partial is not None and self.global_rank == 0:
            found = self.partial.load(*self._place)
        progress = _from_first(found)
        if progress is None:
            return
        self.totals.update({key: progress.sums[key] for key in self.totals.names})
        self.measure.restore(
            {
                key.removeprefix(_STATE): value
                for key, value in progress.sums.items()
                if key.startswith(_STATE)
            }
        )
        self.records = dict(progress.records)
        self.done = progress.done

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


_STATE = "state."


class _Bar(TQDMProgressBar):  # type: ignore[misc]
    """Names the pass instead of 'Predicting DataLoader 0'."""

    @property
    def predict_description(self) -> str:
        return str(self.trainer.lightning_module.name)


def from_all(own: Any) -> list[Any]:
    """An object of every rank, on every rank."""
    if not several():
        return [own]
    shared = [own] * distributed.get_world_size()
    distributed.all_gather_object(shared, own)
    return shared


def _gather(records: dict[int, Any]) -> dict[int, Any]:
    """The records of all ranks; an index that two ranks measured is an error."""
    if not several():
        return records
    shares: list[dict[int, Any]] = from_all(records)
    together: dict[int, Any] = {}
    for share in shares:
        twice = together.keys() & share.keys()
        if twice:
            raise HonesError(f"examples {sorted(twice)[:3]} were measured on two ranks")
        together |= share
    return together


def _from_first(progress: Progress | None) -> Progress | None:
    """The progress of the first rank, on every rank."""
    if not several():
        return progress
    shared = [progress]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _trainer(**settings: Any) -> Trainer:
    """Make a trainer. Raises: HonesError when there are fewer devices than asked for."""
    try:
        return Trainer(**settings)
    except MisconfigurationException as error:
        reason = " ".join(str(error).split())
        raise HonesError(f"{settings['devices']} devices are not available: {reason}") from None


def _check_launch(devices: int, num_nodes: int) -> None:
    """Compare the processes that a launcher started with the flags; Lightning would wait for missing ones."""
    if min(devices, num_nodes) < 1:
        raise HonesError(f"--devices {devices} --num_nodes {num_nodes}: each is 1 or more")
    wanted = f"--devices {devices} --num_nodes {num_nodes} is {devices * num_nodes}"
    if TorchElasticEnvironment.detect():
        _check_started(wanted, devices * num_nodes, "torchrun has started", os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        _check_started(wanted, devices * num_nodes, "SLURM_NTASKS says", os.environ["SLURM_NTASKS"])
        per_node = os.environ.get("SLURM_NTASKS_PER_NODE")
        if devices * num_nodes > 1 and per_node != str(devices):
            raise HonesError(f"--devices {devices} needs `srun --ntasks-per-node {devices}`, not {per_node}")
    elif num_nodes > 1 and not {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys():
        raise HonesError(
            f"--num_nodes {num_nodes} needs a launcher that starts the command on every node, torchrun or "
            "srun: see docs/distributed.md"
        )


def _check_started(wanted: str, number: int, source: str, started: str) -> None:
    if int(started) != number:
        raise HonesError(
            f"{source} {started} processes and {wanted}: the numbers have to agree, see docs/distributed.md"
        )
