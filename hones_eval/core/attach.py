"""Attach steerings to a model, by hooks or folded into its weights, and remove them exactly."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hones_eval.core import edits
from hones_eval.core.adapters import ModelSource, model_source
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.changes import SiteChange, site_changes
from hones_eval.core.condition import AnyCondition, check_conditions
from hones_eval.core.folding import fold
from hones_eval.core.hooks import AttachedEdits, Edit, Site
from hones_eval.core.pass_checks import check_every_pass
from hones_eval.core.scope import Scope, Scoped, ScopeTracker
from hones_eval.core.steering import Steering
from hones_eval.core.weights import weights_digest
from hones_eval.errors import HonesError

AttachMode = Literal["hook", "fold"]


Conditions = AnyCondition | Sequence[AnyCondition] | None
"""One condition, several that all have to hold, or none."""


class Part(NamedTuple):
    """One of several steerings that are attached together, with its strength, scope and conditions."""

    steering: Steering
    strength: float = 1.0
    scope: Scope = Scope()
    conditions: tuple[AnyCondition, ...] = ()

    @property
    def acts_everywhere(self) -> bool:
        """Whether it acts on every token of every prompt."""
        return self.scope.is_all and not self.conditions


class AttachedSteering:
    """Steerings attached to a model until `detach`."""

    def __init__(
        self,
        attached: AttachedEdits | None,
        *undo: Callable[[], None],
        trackers: Sequence[ScopeTracker] = (),
    ) -> None:
        """Called by `attach_steering`. `attached` is None when the scales are folded into the weights."""
        self._attached = attached
        self._undo = undo
        self._conditional = [tracker for tracker in trackers if tracker.has_conditions]

    @property
    def decided(self) -> list[tuple[int, int]]:
        """For each steering with a condition: on how many prompts it acted, and how many there were."""
        return [(tracker.acted, tracker.prompts) for tracker in self._conditional]

    def check_ran(self) -> None:
        """Raise EditError when a hook has not run since the last check. Folded scales always act."""
        if self._attached is not None:
            self._attached.check_ran()

    def check_ever_ran(self) -> None:
        """Raise EditError when a hook has never run since it was attached."""
        if self._attached is not None:
            self._attached.check_ever_ran()

    def warn_if_nothing_changed(self) -> None:
        """Warn when the hooks ran, but none of them changed its input in its first runs."""
        for acted, prompts in self.decided:
            if prompts and not acted:
                warnings.warn(
                    f"the condition held for none of {prompts} prompts, so the steering never acted",
                    stacklevel=3,
                )
        if self._attached is not None and not self._conditional and self._attached.changed_nothing():
            warnings.warn(
                "the steering was attached and ran, but changed no activation: what it scales was 0, or its "
                "scales are too close to 1",
                stacklevel=3,
            )

    def detach(self) -> None:
        """Restore the model bit for bit. Safe to call twice."""
        for undo in self._undo:
            undo()


def attach_steering(
    model: nn.Module,
    steering: Steering,
    how: AttachMode = "hook",
    strength: float = 1.0,
    scope: str | Scope = "all",
    condition: Conditions = None,
) -> AttachedSteering:
    """Scale and shift heads and neurons of `model` until the returned object is detached.

    Args:
        model: any vision-language model that `Anatomy.of` supports, also compiled, or inside of
            `DataParallel` or a `PeftModel`.
        steering: scales whose shapes fit the model's language model.
        how: `hook` multiplies activations on every call, and also works with quantized or shared weights.
            Every forward pass checks that all hooks ran in it, compiled or not, and raises EditError
            otherwise. `fold` multiplies the columns of `o_proj` and `down_proj`, and adds what shifts write
            to their biases, which costs nothing at run time.
        strength: a scale `s` becomes `1 + strength * (s - 1)`; a shift is multiplied by it.
        scope: the tokens that it acts on: `all`, `prompt`, `image`, `text`, `last`, `generated`, several
            joined by `+`, or a `Scope` with positions or texts.
        condition: the prompts that it acts on: a `Condition`, a `TextCondition`, or several that all have to
            hold. It is decided once per prompt, by the model without this steering.

    Raises:
        MisfitError: the steering or the condition was made for a model of another shape.
        HonesError: `fold` on weights that cannot be folded, or with a scope other than `all` or a condition;
            conditions that contradict.
    """
    return attach_to_anatomy(Anatomy.of(model), steering, how, strength, scope, model, condition)


def attach_to_anatomy(
    anatomy: Anatomy,
    steering: Steering,
    how: AttachMode = "hook",
    strength: float = 1.0,
    scope: str | Scope = "all",
    called: nn.Module | None = None,
    condition: Conditions = None,
) -> AttachedSteering:
    """Attach a steering to a model whose anatomy is already known. See `attach_steering`.

    `called` is the module that users call where it is not the model itself, as after `torch.compile(model)`.
    """
    conditions = () if condition is None else condition if isinstance(condition, Sequence) else (condition,)
    part = Part(steering, strength, Scope.parse(scope), check_conditions(conditions))
    return attach_parts(anatomy, [part], how, called)


def attach_parts(
    anatomy: Anatomy, parts: Sequence[Part], how: AttachMode = "hook", called: nn.Module | None = None
) -> AttachedSteering:
    """Attach several steerings, each with its strength, scope and conditions. See `attach_steering`.

    They act one after the other. Conditions are decided by the model without any of them.
    """
    found = [(part, _changes(anatomy, part)) for part in parts]
    if how == "fold":
        for part in parts:
            if not part.scope.is_all:
                raise HonesError(f"attach=fold scales every token, so scope={part.scope} needs attach=hook")
            if part.conditions:
                names = "+".join(condition.name for condition in part.conditions)
                raise HonesError(f"attach=fold acts on every prompt, so condition={names} needs attach=hook")
        with ExitStack() as stack:  # of several, one may not be foldable: then none stays in the weights
            for _, changes in found:
                stack.callback(fold(anatomy, changes))
            return AttachedSteering(None, stack.pop_all().close)
    if how != "hook":
        raise HonesError(f"attach={how!r} is not known: use hook or fold")
    layer_of = {site.name: layer for layer, site in enumerate(anatomy.heads_in)}
    layer_of |= {site.name: layer for layer, site in enumerate(anatomy.neurons_in)}
    layers = [(part.scope, layer_of[change.site.name]) for part, changes in found for change in changes]
    first = min((layer for _, layer in layers), default=0)
    # A part that acts on generated tokens alone leaves the prompt, of which conditions are read, as it is.
    in_prompt = [layer for scope, layer in layers if scope.acts_on_prompt]
    first_in_prompt = min(in_prompt, default=len(layer_of))
    any_condition = any(part.conditions for part in parts)
    made: list[tuple[Site, Edit]] = []
    trackers: list[ScopeTracker] = []
    for part, changes in found:
        if part.acts_everywhere and not any_condition:
            made += [(change.site, _Scaling(change)) for change in changes]
            continue
        tracker = ScopeTracker(anatomy, part.scope, part.conditions, first, first_in_prompt)
        trackers.append(tracker)
        made += [(c.site, Scoped(_Scaling(c), tracker, c.site.name)) for c in changes]
    with ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.attach().detach)
        attached = AttachedEdits(made)
        stack.callback(attached.detach)
        if made:
            top = called if isinstance(called, nn.Module) else anatomy.model
            # Layers that attend to an image by cross-attention are left out where there is none.
            some = anatomy.reads_states and not anatomy.is_encoder_decoder
            stack.callback(check_every_pass(top, anatomy.decoder, attached, some=some))
        return AttachedSteering(attached, stack.pop_all().close, trackers=trackers)


def _changes(anatomy: Anatomy, part: Part) -> list[SiteChange]:
    """What a steering changes in a model, after the checks that it fits."""
    part.steering.check_fits(anatomy.shape, type(anatomy.model).__name__)
    steering = part.steering.at_strength(part.strength)
    warn_of_rounding(steering, anatomy.model.dtype)
    here = model_source(anatomy.model)
    if here["base_model"] != type(anatomy.model).__name__:  # built in memory, it has no name to compare
        warn_of_another_model(steering.provenance, here, lambda: weights_digest(anatomy.model))
    return site_changes(anatomy, steering)


@contextmanager
def steer(
    model: nn.Module,
    steering: Steering,
    how: AttachMode = "hook",
    strength: float = 1.0,
    scope: str | Scope = "all",
    condition: Conditions = None,
) -> Iterator[AttachedSteering]:
    """Steer a model for the length of a `with` block. See `attach_steering` for the arguments.

    Raises: EditError in a forward pass that bypassed a hook, and at the end of the block when a hook never
        ran in it, so that nothing was steered. Warns when no hook changed an activation.
    """
    attached = attach_steering(model, steering, how, strength, scope, condition)
    try:
        yield attached
        attached.check_ever_ran()
        attached.warn_if_nothing_changed()
    finally:
        attached.detach()


def warn_of_rounding(steering: Steering, dtype: torch.dtype) -> None:
    """Warn of scales so close to 1 that weights or activations of a type cannot show them."""
    lost = steering.rounded_away(dtype)
    if lost:
        scaled = int((steering.head_scales != 1).sum()) + int((steering.neuron_scales != 1).sum())
        kind = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{lost} of {scaled} scales are within {torch.finfo(dtype).eps / 4:.2g} of 1, where rounding to "
            f"{kind} undoes them: load the model in float32, or choose larger scales",
            stacklevel=2,
        )


def warn_of_another_model(
    made_for: Provenance, here: ModelSource, digest: Callable[[], str] | None = None
) -> None:
    """Warn when a steering was made for other weights of the same shape, naming both.

    Args:
        made_for: of the steering.
        here: the model that it is used on.
        digest: computes the digest of that model's weights, by which a renamed copy is recognized.
    """
    same_adapter = _last_part(here["adapter"]) == _last_part(made_for.adapter)
    if _last_part(here["base_model"]) == _last_part(made_for.base_model) and same_adapter:
        return
    if digest is not None and made_for.weights is not None and made_for.weights == digest():
        return  # the same model under another name
    names = [
        base if adapter is None else f"{base} with the adapter {adapter}"
        for base, adapter in (
            (made_for.base_model, made_for.adapter),
            (here["base_model"], here["adapter"]),
        )
    ]
    warnings.warn(
        f"this steering was made for {names[0]}, but the model is {names[1]}: it has the same shape, but "
        "its heads and neurons may do other things",
        stacklevel=3,
    )


def _last_part(path: str | None) -> str | None:
    """The name of a folder or of a hub repository: a local copy of a hub model is the same model."""
    return None if path is None else path.rstrip("/").rpartition("/")[2]


class _Scaling(edits.Scaling):
    """The edit of one site: scales, and shifts if need be, its input on whichever device the input is."""

    is_safe = True

    def __init__(self, change: SiteChange) -> None:
        weight = getattr(change.site.module, "weight", None)
        scales, shifts = change.scales, change.shifts
        # The weight of an offloaded layer is on the meta device until the layer is called.
        if isinstance(weight, Tensor) and not weight.is_meta:
            scales = scales.to(weight.device)
            shifts = None if shifts is None else shifts.to(weight.device)
        super().__init__(scales, shifts)
        self._kept, self._added = scales, shifts

    @property
    def factor(self) -> Tensor | None:
        """What the input is multiplied by, if that is all; see `hooks.Edit`."""
        return self._kept if self._added is None else None

    def scales(self, like: Tensor) -> Tensor:
        """The scales, which are moved once."""
        if self._kept.device != like.device:
            self._kept = self._kept.to(like.device)
        return self._kept

    def shifts(self, like: Tensor) -> Tensor | None:
        """The shifts, which are moved once."""
        if self._added is not None and self._added.device != like.device:
            self._added = self._added.to(like.device)
        return self._added

    def __call__(self, x: Tensor) -> Tensor:
        """Change the input of a linear layer; runs at every generated token."""
        if self._added is not None:
            return super().__call__(x)
        kept = self._kept
        return edits.scale(x, kept if kept.device == x.device else self.scales(x))
