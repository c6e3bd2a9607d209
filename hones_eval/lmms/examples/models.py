"""lmms-eval models by name, each as one process, and the Hugging Face model inside."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from transformers import PreTrainedModel

from hones_eval.errors import HonesError, UnsupportedModelError, one_line

# What launchers set. A wrapper that sees them joins a process group and demands GPUs; here each process
# measures its own examples, and whoever launched the processes adds their sums up.
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


def load_lmm(model: str, model_args: str, *, device: str | None = None) -> lmms:
    """Build an lmms-eval model by name with batch size 1, as one process whatever launched this one.

    Args:
        model: what `lmms-eval --model` takes.
        model_args: what `lmms-eval --model_args` takes; what it says wins over what is chosen here.
        device: a torch device; by default this process's GPU, or the CPU where there is none. A wrapper
            that takes a `device_map` is given the same.

    Raises: HonesError for an unknown name (with the nearest ones) or a model that cannot be built.
    """
    cls = _wrapper_class(model)
    given = _parsed(model_args)
    place = device or str(given.get("device") or _own_device())
    chosen: dict[str, Any] = {"batch_size": 1, "device": place}
    if _takes(cls, "device_map"):
        chosen["device_map"] = place
    with _launcher_hidden():
        try:
            lmm: lmms = cls(**(chosen | given | {"batch_size": 1}))
        except HonesError:
            raise
        except Exception as error:
            raise HonesError(
                f"lmms-eval's {model} cannot be built from model_args {model_args!r}: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    inner_model(lmm).eval()
    return lmm


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
        raise HonesError(f"lmms-eval's {model} cannot be imported: {one_line(error)}") from error
    return found


def _parsed(model_args: str) -> dict[str, Any]:
    try:
        return dict(simple_parse_args_string(model_args))
    except ValueError:
        raise HonesError(
            f"model_args {model_args!r} are not of the form name=value,name=value, as lmms-eval wants them"
        ) from None


def _own_device() -> str:
    """The GPU with the number of this process on its node, as torchrun, Lightning or SLURM gives it."""
    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return f"cuda:{int(number) % torch.cuda.device_count()}"


def _takes(cls: type, name: str) -> bool:
    """Whether a constructor on the way up names the argument; mixins hand `**kwargs` on."""
    constructors = [vars(one)["__init__"] for one in cls.__mro__[:-1] if "__init__" in vars(one)]
    return any(name in inspect.signature(one).parameters for one in constructors)


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
    """Give the Hugging Face model inside an lmms-eval model.

    Raises: UnsupportedModelError where there is none, as behind an API, or one that does not generate.
    """
    named = [getattr(lmm, name, None) for name in ("model", "_model")]
    found = [one for one in (*named, *vars(lmm).values()) if isinstance(one, PreTrainedModel)]
    name = type(lmm).__name__
    if not found:
        raise UnsupportedModelError(
            f"{name} holds no Hugging Face model, as `.model`, whose heads could be measured"
        )
    if not found[0].can_generate():
        raise UnsupportedModelError(f"{name} holds a {type(found[0]).__name__}, which cannot generate")
    return found[0]
