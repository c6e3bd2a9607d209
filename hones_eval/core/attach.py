"""Attach a steering to a model, by hooks or folded into its weights, and remove it exactly."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core import edits
from hones_eval.core.adapters import ModelSource, model_source
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.experts import NeuronTap
from hones_eval.core.hooks import AttachedEdits, Site, guard_hooks
from hones_eval.core.pass_checks import check_every_pass
from hones_eval.core.scope import Scope, Scoped, ScopeTracker
from hones_eval.core.steering import Steering
from hones_eval.core.weights import weights_digest, weights_written
from hones_eval.errors import HonesError

AttachMode = Literal["hook", "fold"]


class AttachedSteering:
    """A steering attached to a model until `detach`."""

    def __init__(self, attached: AttachedEdits | None, *undo: Callable[[], None]) -> None:
        """Called by `attach_steering`. `attached` is None when the scales are folded into the weights."""
        self._attached = attached
        self._undo = undo

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
        if self._attached is not None and self._attached.changed_nothing():
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
) -> AttachedSteering:
    """Scale heads and neurons of `model` until the returned object is detached.

    Args:
        model: any vision-language model that `Anatomy.of` supports, also compiled, or inside of
            `DataParallel` or a `PeftModel`.
        steering: scales whose shapes fit the model's language model.
        how: `hook` multiplies activations on every call, and also works with quantized or shared weights.
            Every forward pass checks that all hooks ran in it, compiled or not, and raises EditError
            otherwise. `fold` multiplies the columns of `o_proj` and `down_proj`, which costs nothing at run
            time.
        strength: a scale `s` becomes `1 + strength * (s - 1)`.
        scope: the tokens that it acts on: `all`, `prompt`, `image`, `text`, `last`, `generated`, several
            joined by `+`, or a `Scope` with positions or texts.

    Raises:
        MisfitError: the steering was made for a model of another shape.
        HonesError: `fold` on weights that cannot be folded, or with a scope other than `all`.
    """
    return attach_to_anatomy(Anatomy.of(model), steering, how, strength, scope, model)


def attach_to_anatomy(
    anatomy: Anatomy,
    steering: Steering,
    how: AttachMode = "hook",
    strength: float = 1.0,
    scope: str | Scope = "all",
    called: nn.Module | None = None,
) -> AttachedSteering:
    """Attach a steering to a model whose anatomy is already known. See `attach_steering`.

    `called` is the module that users call where it is not the model itself, as after `torch.compile(model)`.
    """
    scope = Scope.parse(scope)
    steering.check_fits(anatomy.shape, type(anatomy.model).__name__)
    steering = steering.at_strength(strength)
    warn_of_rounding(steering, anatomy.model.dtype)
    here = model_source(anatomy.model)
    if here["base_model"] != type(anatomy.model).__name__:  # built in memory, it has no name to compare
        warn_of_another_model(steering.provenance, here, lambda: weights_digest(anatomy.model))
    scaled = scaled_sites(anatomy, steering)
    if how == "fold":
        if not scope.is_all:
            raise HonesError(f"attach=fold scales every token, so scope={scope} needs attach=hook")
        return AttachedSteering(None, _fold(anatomy, scaled))
    if how != "hook":
        raise HonesError(f"attach={how!r} is not known: use hook or fold")
    undo: list[Callable[[], None]] = []
    if scope.is_all:
        attached = AttachedEdits([(site, _Scaling(site, scales)) for site, scales in scaled])
    else:
        tracker = ScopeTracker(anatomy, scope).attach()
        undo.append(tracker.detach)
        attached = AttachedEdits(
            [(site, Scoped(_Scaling(site, scales), tracker, site.name)) for site, scales in scaled]
        )
    if scaled:
        top = called if isinstance(called, nn.Module) else anatomy.model
        # Layers that attend to an image by cross-attention are left out where there is none.
        some = anatomy.reads_states and not anatomy.is_encoder_decoder
        undo.append(check_every_pass(top, anatomy.decoder, attached, some=some))
    return AttachedSteering(attached, attached.detach, *undo)


@contextmanager
def steer(
    model: nn.Module,
    steering: Steering,
    how: AttachMode = "hook",
    strength: float = 1.0,
    scope: str | Scope = "all",
) -> Iterator[AttachedSteering]:
    """Steer a model for the length of a `with` block. See `attach_steering` for the arguments.

    Raises: EditError in a forward pass that bypassed a hook, and at the end of the block when a hook never
        ran in it, so that nothing was steered. Warns when no hook changed an activation.
    """
    attached = attach_steering(model, steering, how, strength, scope)
    try:
        yield attached
        attached.check_ever_ran()
        attached.warn_if_nothing_changed()
    finally:
        attached.detach()


def scaled_sites(anatomy: Anatomy, steering: Steering) -> list[tuple[Site, Tensor]]:
    """List the linear layers whose inputs a steering changes, with one scale per input feature.

    Layers whose scales are all 1 are left out.
    """
    everything = [
        (site, anatomy.head_features(scales, layer))
        for layer, (site, scales) in enumerate(zip(anatomy.heads_in, steering.head_scales, strict=True))
    ]
    everything += [
        (site, anatomy.neuron_features(scales, layer))
        for layer, (site, scales) in enumerate(zip(anatomy.neurons_in, steering.neuron_scales, strict=True))
    ]
    return [(site, scales) for site, scales in everything if not bool((scales == 1).all())]


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
    """The edit of one site: multiplies its input by the scales, on whichever device the input is."""

    def __init__(self, site: Site, scales: Tensor) -> None:
        weight = getattr(site.module, "weight", None)
        # The weight of an offloaded layer is on the meta device until the layer is called.
        if isinstance(weight, Tensor) and not weight.is_meta:
            scales = scales.to(weight.device)
        super().__init__(scales)
        self._kept = scales

    def scales(self, like: Tensor) -> Tensor:
        """The scales, which are moved once."""
        if self._kept.device != like.device:
            self._kept = self._kept.to(like.device)
        return self._kept

    def __call__(self, x: Tensor) -> Tensor:
        """Scale the input of a linear layer; runs at every generated token."""
        return edits.scale(x, self.scales(x))


def linear_sites(scaled: list[tuple[Site, Tensor]]) -> list[tuple[Site, Tensor]]:
    """The same scales by linear layer: the neurons of a mixture of experts are in one of each expert."""
    found = []
    for site, scales in scaled:
        if not isinstance(site.module, NeuronTap):
            found.append((site, scales))
            continue
        for name, module, start, width in site.module.linear_parts():
            own = scales[start : start + width]
            if not bool((own == 1).all()):
                found.append((Site(name, module, width), own))
    return found


def _fold(anatomy: Anatomy, scaled: list[tuple[Site, Tensor]]) -> Callable[[], None]:
    scaled = linear_sites(scaled)
    for site, scales in scaled:
        reason = why_not_foldable(anatomy.model, site, scales)
        if reason is not None:
            raise HonesError(f"{site.name} {reason}: use attach=hook")
    guard_hooks()  # compiled code may have constants in the place of the weights
    folds = [_FoldedWeight.of(site.module).add(scales) for site, scales in scaled]

    def restore() -> None:
        while folds:
            folds.pop()()

    return restore


class _FoldedWeight:
    """The scales that are folded into one weight, with its original columns.

    Folds may be removed in any order: the original columns are restored, and those scales that are left are
    folded again. Dividing by the removed scales would not give the same numbers.
    """

    _of: ClassVar["WeakKeyDictionary[nn.Module, _FoldedWeight]"] = WeakKeyDictionary()

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._columns = torch.empty(0, dtype=torch.long)
        self._original = self._weight()[:, :0].clone()
        self._folds: dict[object, Tensor] = {}

    @classmethod
    def of(cls, module: nn.Module) -> "_FoldedWeight":
        if module not in cls._of:
            cls._of[module] = cls(module)
        return cls._of[module]

    def add(self, scales: Tensor) -> Callable[[], None]:
        """Fold scales [in features] into the weight; the returned function takes them out again."""
        weight, key = self._weight(), object()
        columns = torch.nonzero(scales != 1).flatten()
        new = columns[~torch.isin(columns, self._columns)]
        self._original = torch.cat(
            [self._original.to(weight.device), weight[:, new.to(weight.device)]], dim=1
        )
        self._columns = torch.cat([self._columns, new])
        self._folds[key] = scales
        self._multiply(scales)
        return lambda: self._remove(key)

    def _remove(self, key: object) -> None:
        module = self._module()
        if module is None:  # the model is gone, and its weights with it
            return
        weight = self._weight()
        weight[:, self._columns.to(weight.device)] = self._original.to(weight.device)
        del self._folds[key]
        for scales in self._folds.values():
            self._multiply(scales)
        if not self._folds:
            self._of.pop(module, None)

    def _multiply(self, scales: Tensor) -> None:
        weight = self._weight()
        columns = torch.nonzero(scales != 1).flatten().to(weight.device)
        folded = weight[:, columns].float() * scales.to(weight.device)[columns]
        weight[:, columns] = folded.to(weight.dtype)

    def _weight(self) -> Tensor:
        module = self._module()
        assert module is not None
        weights_written()
        weight: Tensor = module.weight.data  # type: ignore[assignment]
        return weight


def why_not_foldable(model: PreTrainedModel, site: Site, scales: Tensor | None = None) -> str | None:
    """Why scales cannot be folded into a site's weight, as the end of a sentence; None where they can.

    Args:
        model: the model that the site belongs to.
        site: the linear layer.
        scales: scales [in features] to try; None tries a fold of every column.
    """
    weight = site.module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return "has quantized weights, which cannot be folded"
    if weight.is_meta:
        return "is offloaded from memory, so nothing can be folded"
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        return f"shares its weight ({' and '.join(owners)} are one tensor), so folding would scale both"
    changed = torch.ones(site.width) if scales is None else scales != 1
    if not _folding_acts(site, torch.nonzero(changed).flatten()):
        return (
            f"({type(site.module).__name__}) does not multiply its input by its plain weight (it is "
            "quantized, parametrized or adapted), so folded scales would not act as hooked ones do"
        )
    return None


def _folding_acts(site: Site, columns: Tensor) -> bool:
    """Whether columns of a copy of the module, scaled in its weight, act as the same scales of its input.

    The trial factor is -0.5: every product is exact in floating point, so the two outputs have to be equal up
    to the order of summation. Anything between input and weight (a quantized tensor that ignores or cannot
    take the assignment, a weight computed from other parameters, a low-rank adapter beside the weight) shows.
    """
    factor = -0.5
    try:
        trial = copy.deepcopy(site.module)
        weight: Tensor = trial.weight.data  # type: ignore[assignment]
        columns = columns.to(weight.device)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, site.width, generator=generator).to(weight.device, weight.dtype)
        scaled_input = x.clone()
        scaled_input[..., columns] *= factor
        with torch.no_grad():
            plain, hooked = trial(x).float(), trial(scaled_input).float()
            weight[:, columns] = weight[:, columns] * factor
            folded = trial(x).float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False  # a tensor that cannot be copied, indexed or assigned to
    effect = float((plain - hooked).abs().max())
    return bool(torch.isfinite(folded).all()) and float((folded - hooked).abs().max()) <= 1e-2 * effect
