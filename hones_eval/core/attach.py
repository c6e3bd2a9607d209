"""Attach a steering to a model, by hooks or folded into its weights, and remove it exactly."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core import edits
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import AttachedEdits, Edit, Site
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError

AttachMode = Literal["hook", "fold"]


class AttachedSteering:
    """A steering attached to a model until `detach`."""

    def __init__(self, attached: AttachedEdits | None, undo: Callable[[], None]) -> None:
        """Called by `attach_steering`. `attached` is None when the scales are folded into the weights."""
        self._attached = attached
        self._undo = undo

    def check_ran(self) -> None:
        """Raise EditError when a hook has not run since the last check. Folded scales always act."""
        if self._attached is not None:
            self._attached.check_ran()

    def detach(self) -> None:
        """Restore the model bit for bit. Safe to call twice."""
        self._undo()


def attach_steering(
    model: PreTrainedModel, steering: Steering, how: AttachMode = "hook", strength: float = 1.0
) -> AttachedSteering:
    """Scale heads and neurons of `model` until the returned object is detached.

    Args:
        model: any vision-language model that `Anatomy.of` supports.
        steering: scales whose shapes fit the model's language model.
        how: `hook` multiplies activations on every call, and also works with quantized or shared weights;
            `fold` multiplies the columns of `o_proj` and `down_proj`, which costs nothing at run time.
        strength: a scale `s` becomes `1 + strength * (s - 1)`.

    Raises:
        MisfitError: the steering was made for a model of another shape.
        HonesError: `fold` on weights that cannot be folded.
    """
    return attach_to_anatomy(Anatomy.of(model), steering, how, strength)


def attach_to_anatomy(
    anatomy: Anatomy, steering: Steering, how: AttachMode = "hook", strength: float = 1.0
) -> AttachedSteering:
    """Attach a steering to a model whose anatomy is already known. See `attach_steering`."""
    steering.check_fits(anatomy.shape, type(anatomy.model).__name__)
    steering = steering.at_strength(strength)
    _warn_of_rounding(anatomy, steering)
    scaled = scaled_sites(anatomy, steering)
    if how == "fold":
        return AttachedSteering(None, _fold(anatomy, scaled))
    if how != "hook":
        raise HonesError(f"attach={how!r} is not known: use hook or fold")
    attached = AttachedEdits([(site, _scaling(site, scales)) for site, scales in scaled])
    return AttachedSteering(attached, attached.detach)


@contextmanager
def steer(
    model: PreTrainedModel, steering: Steering, how: AttachMode = "hook", strength: float = 1.0
) -> Iterator[AttachedSteering]:
    """Steer a model for the length of a `with` block. See `attach_steering` for the arguments."""
    attached = attach_steering(model, steering, how, strength)
    try:
        yield attached
    finally:
        attached.detach()


def scaled_sites(anatomy: Anatomy, steering: Steering) -> list[tuple[Site, Tensor]]:
    """List the linear layers whose inputs a steering changes, with one scale per input feature.

    Layers whose scales are all 1 are left out.
    """
    per_feature = steering.head_scales.repeat_interleave(anatomy.shape.head_width, dim=1)
    everything = [*zip(anatomy.heads_in, per_feature, strict=True)]
    everything += zip(anatomy.neurons_in, steering.neuron_scales, strict=True)
    return [(site, scales) for site, scales in everything if not bool((scales == 1).all())]


def _warn_of_rounding(anatomy: Anatomy, steering: Steering) -> None:
    dtype = anatomy.model.dtype
    lost = steering.rounded_away(dtype)
    if lost:
        scaled = int((steering.head_scales != 1).sum()) + int((steering.neuron_scales != 1).sum())
        kind = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{lost} of {scaled} scales are within {torch.finfo(dtype).eps / 4:.2g} of 1, where rounding to "
            f"{kind} undoes them: load the model in float32, or choose larger scales",
            stacklevel=2,
        )


def _scaling(site: Site, scales: Tensor) -> Edit:
    weight = site.module.weight
    device = weight.device if isinstance(weight, Tensor) else None
    return partial(edits.scale, scales=scales.to(device))


def _fold(anatomy: Anatomy, scaled: list[tuple[Site, Tensor]]) -> Callable[[], None]:
    for site, _ in scaled:
        _check_foldable(anatomy.model, site)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for site, scales in scaled:
        weight: Tensor = site.module.weight.data  # type: ignore[assignment]
        columns = torch.nonzero(scales != 1).flatten().to(weight.device)
        kept.append((weight, columns, weight[:, columns].clone()))
        folded = weight[:, columns].float() * scales.to(weight.device)[columns]
        weight[:, columns] = folded.to(weight.dtype)

    def restore() -> None:
        while kept:
            weight, columns, original = kept.pop()
            weight[:, columns] = original

    return restore


def _check_foldable(model: PreTrainedModel, site: Site) -> None:
    weight = site.module.weight
    if not isinstance(site.module, nn.Linear) or not isinstance(weight, Tensor):
        raise HonesError(f"{site.name} is a {type(site.module).__name__}: use attach=hook")
    if not weight.is_floating_point() or weight.shape[1] != site.width:
        raise HonesError(f"{site.name} has quantized weights, which cannot be folded: use attach=hook")
    if weight.is_meta:
        raise HonesError(f"{site.name} is offloaded from memory, so nothing can be folded: use attach=hook")
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise HonesError(
            f"{' and '.join(owners)} are one tensor, so folding would scale both: use attach=hook"
        )
