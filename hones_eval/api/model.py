"""A model that is ready to be measured: its lmms-eval wrapper, its anatomy, and the loop over examples."""

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lmms_eval.api.model import lmms
from transformers import PreTrainedModel

from hones_eval.choices import DType, Rows
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.proofs import Proofs
from hones_eval.core.unwrapping import unwrapped
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.notes import duration, note
from hones_eval.runs.lightning import Loop


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A loaded vision-language model with everything that the jobs need; made by `load`.

    `name`, `model_args`: as in lmms-eval `--model` and `--model_args`.
    `lmm`: the lmms-eval wrapper, which makes prompts and answers.
    `anatomy`: the decoder layers, heads and FFN of the language model inside.
    `replayer`: runs edited forward passes.
    `loop`: runs passes over examples, on one device or several.
    """

    name: str
    model_args: str
    lmm: lmms
    anatomy: Anatomy
    replayer: Replayer
    loop: Loop

    @classmethod
    def wrap(
        cls,
        lmm: lmms,
        name: str,
        model_args: str,
        *,
        batch_size: Rows = "auto",
        devices: int = 1,
        num_nodes: int = 1,
    ) -> Self:
        """Measure an lmms-eval model that is already built."""
        anatomy = Anatomy.of(inner_model(lmm))
        accelerator: Literal["cpu", "cuda"] = "cuda" if anatomy.device.type == "cuda" else "cpu"
        loop = Loop(accelerator, devices, num_nodes)
        rows = None if batch_size == "auto" else batch_size
        return cls(
            name, model_args, lmm, anatomy, Replayer(anatomy, rows, proofs=Proofs(anatomy.model)), loop
        )

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model."""
        return self.anatomy.model

    @property
    def dtype(self) -> str:
        """The model's floating-point type, as torch names it without its prefix."""
        return str(self.anatomy.model.dtype).removeprefix("torch.")

    def examples(
        self,
        task: str,
        *,
        include_path: Path | None = None,
        limit: int | None = None,
        offset: int = 0,
        gen_kwargs: str | None = None,
        metric: str | None = None,
        target: str | None = None,
    ) -> TaskExamples:
        """Examples of an lmms-eval task, prompted by this model's wrapper.

        Raises: HonesError when there is no such task, no example is left, or gold answers are not found.
        """
        if "," in task:
            raise HonesError(f"--tasks {task}: give one task at a time, each in a run of its own")
        note(f"reading the examples of {task}")
        examples = TaskExamples(
            self.lmm,
            task,
            model_name=self.name,
            include_path=include_path,
            limit=limit,
            offset=offset,
            gen_kwargs=gen_kwargs,
            metric=metric,
            target=target,
        )
        examples.check_targets()
        return examples

    def settings(self, examples: TaskExamples, **others: Any) -> dict[str, Any]:
        """The settings that an artifact records: the model, the metric, and `others`."""
        return {
            "model": self.name,
            "model_args": self.model_args,
            "metric": examples.metric,
            "target": examples.target_source,
            "dtype": self.dtype,
        } | others

    def __repr__(self) -> str:
        """The model, its size and its wrapper, in one line."""
        shape = self.anatomy.shape
        return (
            f"<hones_eval.Model {type(self.model).__name__}: {shape.layers} layers of {shape.heads} heads "
            f"and {shape.neurons} neurons, {self.dtype}, asked through {self.name}>"
        )


def load(
    model: str | torch.nn.Module,
    model_args: Any = "",
    *,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Model:
    """Prepare a model for measuring: by its lmms-eval name, or one that is already loaded.

    Args:
        model: what `lmms-eval --model` takes; or a vision-language model of transformers, which is prompted
            through its processor's chat template. It is used as it is: on its device, in its type.
        model_args: what `lmms-eval --model_args` takes, `name=value,name=value`; or the processor of a loaded
            model.
        dtype: the model's floating-point type; `auto` leaves it as the wrapper loads it.
        batch_size: edited passes run at once; `auto` fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the program on each.

    Raises: HonesError for a model that cannot be built; UnsupportedModelError for an unknown anatomy.

    Examples:
        >>> from hones_eval.toy import checkpoint_path
        >>> model = load("hones_llava", f"pretrained={checkpoint_path()}")
        >>> model
        <hones_eval.Model LlavaForConditionalGeneration: 6 layers of 8 heads and 344 neurons, ...
    """
    if isinstance(model, torch.nn.Module):
        return _live(unwrapped(model), model_args, dtype, batch_size, devices, num_nodes)
    note(f"loading {model} ({model_args})")
    began = time.monotonic()
    lmm = load_lmm(model, model_args, dtype=None if dtype == "auto" else getattr(torch, dtype))
    loaded = Model.wrap(lmm, model, model_args, batch_size=batch_size, devices=devices, num_nodes=num_nodes)
    taken = duration(time.monotonic() - began)
    note(f"loaded in {taken}, on {loaded.anatomy.unembedding.device}: {loaded!r}")
    return loaded


def _live(
    model: PreTrainedModel, processor: Any, dtype: DType, batch_size: Rows, devices: int, num_nodes: int
) -> Model:
    """A loaded model, prompted by the wrapper of `hones_hf`."""
    if isinstance(processor, str):
        raise HonesError("give the processor of the loaded model too: load(model, processor)")
    if dtype != "auto":
        raise HonesError(f"dtype={dtype!r}: a loaded model is used as it is; cast it before")
    # By its name: model_wrappers is a top-level folder of a checkout, where type checkers do not find it.
    lmm = import_module("hones_eval.model_wrappers.hf").HfModel.around(model, processor)
    name = str(model.config.name_or_path) or type(model).__name__
    return Model.wrap(
        lmm, "hones_hf", f"pretrained={name}", batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )
