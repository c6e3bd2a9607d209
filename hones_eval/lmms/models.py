"""Loads lmms-eval models by name, each as one process, and finds the Hugging Face model inside."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any
from unittest import mock

import torch
from lmms_eval.api.model import lmms
from transformers import PreTrainedModel

from hones_eval.core.adapters import adapter_of, apply_adapter, without_adapter
from hones_eval.core.files import check_folder
from hones_eval.core.unwrapping import held_model
from hones_eval.errors import HonesError, UnsupportedModelError, one_line
from hones_eval.lmms.arguments import check_arguments, parsed

# Set by launchers. A wrapper that sees them joins a process group and demands GPUs. Here each process
# measures its own examples, and the loop adds up the sums of all processes.
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


def load_lmm(
    model: str, model_args: str, *, device: str | None = None, dtype: torch.dtype | None = None
) -> lmms:
    """Build an lmms-eval model by name with batch size 1, as one process whatever launched this one.

    Args:
        model: a value of `lmms-eval --model`.
        model_args: a value of `lmms-eval --model_args`; it takes precedence over the defaults here. `peft=`
            names a PEFT adapter to load onto the model, for every wrapper.
        device: a torch device; by default this process's GPU, or the CPU where there is none. It is also
            passed as `device_map` to wrappers that have one.
        dtype: the type in which the weights are loaded, also by wrappers that always load another one;
            by default the wrapper's choice.

    Raises: HonesError for an unknown name (with the nearest ones) or a model that cannot be built.
    """
    cls = _wrapper_class(model)
    given = without_adapter(_parsed(model_args))
    peft = None if _takes(cls, "peft") else given.pop("peft", None)
    check_arguments(cls, given, f"lmms-eval's {model}")
    check_folder("peft", peft)
    device = device or str(given.get("device") or _own_device())
    defaults: dict[str, Any] = {"batch_size": 1, "device": device}
    if _takes(cls, "device_map"):
        defaults["device_map"] = device
    with _launcher_hidden(), _loading_in(dtype):
        try:
            lmm: lmms = cls(**(defaults | given | {"batch_size": 1}))
        except HonesError:
            raise
        except Exception as error:
            raise HonesError(
                f"lmms-eval's {model} cannot be built from model_args {model_args!r}: "
                f"{type(error).__name__}: {one_line(error)}{_other_name(model)}"
            ) from error
    model_inside = inner_model(lmm).eval()
    if dtype is not None:
        model_inside.to(dtype)  # for wrappers with a loader of their own
    if adapter_of(model_inside) is None:
        apply_adapter(model_inside, peft, given.get("pretrained"))
    return lmm


def _other_name(model: str) -> str:
    """The way out where lmms-eval has a wrapper of Hugging Face checkpoints by a similar name."""
    from lmms_eval.models import MODEL_REGISTRY_V2 as registry

    other = f"{model}_hf"
    return (
        f"; for a Hugging Face checkpoint use --model {other}" if other in registry.list_model_names() else ""
    )


@contextmanager
def _loading_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Load weights in a type within the block, whatever a wrapper asks for.

    Converting a model after it was loaded in bfloat16 would keep weights that are already rounded.
    """
    if dtype is None:
        yield
        return
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("torch_dtype", None)
        return load(cls, *args, **(kwargs | {"dtype": dtype}))

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)):
        yield


def _wrapper_class(model: str) -> type[lmms]:
    from lmms_eval.models import MODEL_REGISTRY_V2 as registry

    known = registry.list_model_names()
    if model not in known:
        near = get_close_matches(model, known)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lmms-eval models` lists them"
        raise HonesError(f"lmms-eval has no model named {model!r}: {hint}")
    try:
        found: type[lmms] = registry.get_model_class(model)
    except Exception as error:
        reason = f"{one_line(error)}{_other_name(model)}"
        raise HonesError(f"lmms-eval's {model} cannot be imported: {reason}") from error
    return found


def _parsed(model_args: str) -> dict[str, Any]:
    return parsed(model_args)


def _own_device() -> str:
    """The GPU whose number is this process's on its node, as set by torchrun, Lightning or SLURM."""
    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return f"cuda:{int(number) % torch.cuda.device_count()}"


def _takes(cls: type, name: str) -> bool:
    """Whether a constructor among the class's bases names the argument; mixins pass `**kwargs` on."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    return any(name in inspect.signature(constructor).parameters for constructor in constructors)


@contextmanager
def _launcher_hidden() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(hidden)


def inner_model(lmm: lmms) -> PreTrainedModel:
    """The Hugging Face model inside an lmms-eval model.

    Raises: UnsupportedModelError where there is none, as for models behind an API, or it does not generate.
    """
    named = [getattr(lmm, name, None) for name in ("model", "_model")]
    found = [model for value in (*named, *vars(lmm).values()) if (model := held_model(value)) is not None]
    name = type(lmm).__name__
    if not found:
        raise UnsupportedModelError(
            f"{name} has no Hugging Face model (looked for `.model`), so it has no heads to measure"
        )
    if not found[0].can_generate():
        raise UnsupportedModelError(f"the {type(found[0]).__name__} of {name} cannot generate")
    return found[0]
