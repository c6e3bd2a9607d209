"""Encoders of images, run once for several passes over one example.

An example's unedited answer is decoded by `generate`, and checked by a pass over prompt and answer. Both
encode the same images. Within `encoded_once` an encoder that is called again with equal inputs returns what
it returned before.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import replaced_forward


@contextmanager
def encoded_once(anatomy: Anatomy) -> Iterator[None]:
    """Run each encoder once per different input within the block."""
    with ExitStack() as stack:
        for module in encoders(anatomy):
            stack.enter_context(replaced_forward(module, _remembering(module.forward)))
        yield


def encoders(anatomy: Anatomy) -> list[nn.Module]:
    """The outermost models inside the whole model that neither hold decoder layers nor lie in the decoder."""
    layers = set(anatomy.layers)
    inside = set(anatomy.decoder.modules())
    found: list[nn.Module] = []
    for module in anatomy.model.modules():  # parents come before their children
        if not isinstance(module, PreTrainedModel) or module in inside:
            continue
        if any(module in outer.modules() for outer in found):
            continue
        if layers.isdisjoint(module.modules()):
            found.append(module)
    return found


def _remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        for known_args, known_kwargs, output in calls:
            if same_value(args, known_args) and same_value(kwargs, known_kwargs):
                return copy.copy(output)
        output = forward(*args, **kwargs)
        calls.append((args, kwargs, copy.copy(output)))  # some callers put other features into what they get
        return output

    return remembered


def same_value(value: Any, known: Any) -> bool:
    """Whether two arguments are equal; objects of unknown kinds are equal only to themselves."""
    if value is known:
        return True
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        alike = value.dtype == known.dtype and value.device == known.device
        return alike and torch.equal(value, known)
    if isinstance(value, Mapping) and isinstance(known, Mapping):
        return value.keys() == known.keys() and all(same_value(value[name], known[name]) for name in value)
    if isinstance(value, Sequence) and isinstance(known, Sequence) and type(value) is type(known):
        if isinstance(value, str):
            return value == known
        return len(value) == len(known) and all(map(same_value, value, known))
    return type(value) is type(known) and isinstance(value, bool | int | float) and value == known
