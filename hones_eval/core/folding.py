"""Fold scales and shifts into the weights and biases of linear layers, and take them out again exactly."""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.changes import SiteChange
from hones_eval.core.experts import NeuronTap
from hones_eval.core.hooks import Site, guard_hooks
from hones_eval.core.weights import weights_written
from hones_eval.errors import HonesError


def linear_changes(changes: Sequence[SiteChange]) -> list[SiteChange]:
    """The same changes by linear layer: the neurons of a mixture of experts are in one of each expert."""
    found = []
    for change in changes:
        module, shifts = change.site.module, change.shifts
        if not isinstance(module, NeuronTap):
            found.append(change)
            continue
        for name, linear, start, width in module.linear_parts():
            own = change.scales[start : start + width]
            added = None if shifts is None else shifts[start : start + width]
            added = None if added is None or not bool(added.any()) else added
            if added is not None or not bool((own == 1).all()):
                found.append(SiteChange(Site(name, linear, width), own, added))
    return found


def fold(anatomy: Anatomy, changes: Sequence[SiteChange]) -> Callable[[], None]:
    """Fold changes into weights and biases. Returns: a function that restores them bit for bit.

    Raises: HonesError that names the first layer into which a change cannot be folded.
    """
    changes = linear_changes(changes)
    for change in changes:
        reason = why_not_foldable(anatomy.model, change.site, change.scales)
        if reason is None and change.shifts is not None:
            reason = why_no_bias(anatomy.model, change.site)
        if reason is not None:
            raise HonesError(f"{change.site.name} {reason}: use attach=hook")
    guard_hooks()  # compiled code may have constants in the place of the weights
    folds = [_FoldedWeight.of(c.site.module).add(c.scales, c.shifts) for c in changes]

    def restore() -> None:
        while folds:
            folds.pop()()

    return restore


class _FoldedWeight:
    """The scales and shifts that are folded into one linear layer, with its original columns and bias.

    Folds may be removed in any order: the original columns are restored, and those scales that are left are
    folded again. Dividing by the removed scales would not give the same numbers.

    A shift `b` of the input becomes `W b` in the bias, with the original weight `W`. Of several folds each
    acts on the result of those before it, as hooks do: a shift is multiplied by scales that are folded later.
    """

    _of: ClassVar["WeakKeyDictionary[nn.Module, _FoldedWeight]"] = WeakKeyDictionary()

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._columns = torch.empty(0, dtype=torch.long)
        self._original = self._weight()[:, :0].clone()
        self._folds: dict[object, tuple[Tensor, Tensor | None]] = {}
        bias = getattr(module, "bias", None)
        self._has_bias_of_shifts = False
        self._bias: Tensor | None = None if bias is None else bias.detach().clone()

    @classmethod
    def of(cls, module: nn.Module) -> "_FoldedWeight":
        if module not in cls._of:
            cls._of[module] = cls(module)
        return cls._of[module]

    def add(self, scales: Tensor, shifts: Tensor | None = None) -> Callable[[], None]:
        """Fold scales and shifts [in features] into the layer; the returned function takes them out again."""
        module, weight, key = self._module(), self._weight(), object()
        assert module is not None
        columns = torch.nonzero(scales != 1).flatten()
        new = columns[~torch.isin(columns, self._columns)]
        self._original = torch.cat(
            [self._original.to(weight.device), weight[:, new.to(weight.device)]], dim=1
        )
        self._columns = torch.cat([self._columns, new])
        self._folds[key] = (scales, shifts)
        self._multiply(scales)
        self._set_bias(module)
        return lambda: self._remove(key)

    def _remove(self, key: object) -> None:
        module = self._module()
        if module is None:  # the model is gone, and its weights with it
            return
        weight = self._weight()
        weight[:, self._columns.to(weight.device)] = self._original.to(weight.device)
        del self._folds[key]
        for scales, _ in self._folds.values():
            self._multiply(scales)
        self._set_bias(module)
        if not self._folds:
            self._of.pop(module, None)

    def _multiply(self, scales: Tensor) -> None:
        weight = self._weight()
        columns = torch.nonzero(scales != 1).flatten().to(weight.device)
        folded = weight[:, columns].float() * scales.to(weight.device)[columns]
        weight[:, columns] = folded.to(weight.dtype)

    def _set_bias(self, module: nn.Module) -> None:
        """Set the bias to the original one and what the folded shifts write."""
        if all(shifts is None for _, shifts in self._folds.values()):
            if self._has_bias_of_shifts:
                _put_bias(module, self._bias)
            self._has_bias_of_shifts = False
            return
        total: Tensor | None = None
        for scales, shifts in self._folds.values():
            total = None if total is None else total * scales.to(total.device)
            if shifts is not None:
                total = shifts if total is None else total + shifts.to(total.device)
        assert total is not None
        weight = self._weight().clone()
        weight[:, self._columns.to(weight.device)] = self._original.to(weight.device)
        _put_bias(module, with_shifts(weight, self._bias, total))
        self._has_bias_of_shifts = True

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


def with_shifts(weight: Tensor, bias: Tensor | None, shifts: Tensor) -> Tensor:
    """The bias [out features] of a linear layer whose input is shifted: `bias + weight @ shifts`."""
    written = weight.float() @ shifts.to(weight.device).float()
    return (written if bias is None else bias.float() + written).to(weight.dtype)


def _put_bias(module: nn.Module, bias: Tensor | None) -> None:
    """Give a linear layer a bias, or take it away. An own bias keeps its parameter."""
    weights_written()
    if bias is None:
        module.register_parameter("bias", None)
    elif module.bias is None:
        module.register_parameter("bias", nn.Parameter(bias.clone(), requires_grad=False))
    else:
        module.bias.data.copy_(bias)  # type: ignore[operator]


def why_no_bias(model: PreTrainedModel, site: Site) -> str | None:
    """Why a linear layer cannot hold what a shift adds, as the end of a sentence; None where it can."""
    if not any(module is site.module for module in model.modules()):
        return "is one of stacked experts, which have no place for the bias that a shift becomes"
    bias = getattr(site.module, "bias", None)
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is bias]
    if len(owners) > 1:
        return f"shares its bias ({' and '.join(owners)} are one tensor), so a shift would be added to both"
    try:
        trial = copy.deepcopy(site.module)
        weight: Tensor = trial.weight.data  # type: ignore[assignment]
        x = torch.randn(1, 3, site.width, generator=torch.Generator().manual_seed(0))
        shifts = torch.ones(site.width)
        with torch.no_grad():
            x = x.to(weight.device, weight.dtype)
            plain, hooked = trial(x).float(), trial(x + shifts.to(x)).float()
            _put_bias(trial, with_shifts(weight, None if bias is None else bias.detach(), shifts))
            folded = trial(x).float()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        folded, plain, hooked = torch.full((1,), torch.nan), torch.zeros(1), torch.zeros(1)
    effect = float((plain - hooked).abs().max())
    if bool(torch.isfinite(folded).all()) and float((folded - hooked).abs().max()) <= 5e-2 * effect:
        return None
    return f"({type(site.module).__name__}) has no place for the bias that a shift becomes"
