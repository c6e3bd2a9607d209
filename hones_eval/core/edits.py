"""Pure tensor edits: no hooks and no models. Inputs are never changed in place."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from hones_eval.core.experts import Routed


def mean_of_others(x: Float[Tensor, "*batch heads width"]) -> Float[Tensor, "*batch heads width"]:
    """Mean replacement (HONES 1): for each head, the mean of the other heads' outputs.

    Zeros when there is only one head.
    """
    heads = x.shape[-2]
    if heads == 1:
        return x.new_zeros(x.shape)
    return (x.sum(dim=-2, keepdim=True) - x) / (heads - 1)


def replace_head_by_mean(
    x: Float[Tensor, "*batch features"], head: int, heads: int
) -> Float[Tensor, "*batch features"]:
    """Replace one head's slice of the input of `o_proj` by the mean of the other heads' slices."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    edited = split.clone()
    edited[..., head, :] = mean_of_others(split)[..., head, :]
    return edited.flatten(-2)


def replace_heads_by_mean_in_rows(
    x: Float[Tensor, "rows tokens features"],
    rows: Int[Tensor, " edited"],
    chosen: Int[Tensor, " edited"],
    heads: int,
) -> Float[Tensor, "rows tokens features"]:
    """Replace head `chosen[i]` by the mean of the other heads in row `rows[i]` of the batch.

    Other rows are unchanged. A row may occur several times; each mean is that of the unedited heads.
    """
    split: Tensor = x.unflatten(-1, (heads, -1))
    edited = split.clone()
    edited[rows, :, chosen] = mean_of_others(split[rows])[range(len(rows)), :, chosen]
    return edited.flatten(-2)


def zero_heads_in_rows(
    x: Float[Tensor, "rows tokens features"],
    rows: Int[Tensor, " edited"],
    chosen: Int[Tensor, " edited"],
    heads: int,
) -> Float[Tensor, "rows tokens features"]:
    """Set the slice of head `chosen[i]` to zero in row `rows[i]` of the batch. Other rows are unchanged."""
    edited: Tensor = x.unflatten(-1, (heads, -1)).clone()
    edited[rows, :, chosen] = 0
    return edited.flatten(-2)


def zero_neurons_in_rows(
    x: Float[Tensor, "rows tokens features"], rows: Int[Tensor, " edited"], chosen: Int[Tensor, " edited"]
) -> Float[Tensor, "rows tokens features"]:
    """Set neuron `chosen[i]` to zero in row `rows[i]` of the batch. Other rows are unchanged."""
    edited = x.clone()
    edited[rows, :, chosen] = 0
    return edited


def scale(
    x: Float[Tensor, "*batch sites"], scales: Float[Tensor, "*#batch sites"]
) -> Float[Tensor, "*batch sites"]:
    """Multiply every feature by its scale (HONES 4, V-SEAM 4). A scale of zero masks the feature.

    The product is computed in the wider of the two dtypes and then rounded to the dtype of `x`. Rounding the
    scale first would lose small scales: in bfloat16 a scale within 0.4 percent of 1 is itself rounded to 1.
    """
    product = x * scales
    return product if product.dtype == x.dtype else product.to(x.dtype)


def scale_and_shift(
    x: Float[Tensor, "*batch sites"],
    scales: Float[Tensor, "*#batch sites"],
    shifts: Float[Tensor, "*#batch sites"],
) -> Float[Tensor, "*batch sites"]:
    """Multiply every feature by its scale and add its shift, in the wider dtype; round to that of `x`."""
    changed = x * scales + shifts
    return changed if changed.dtype == x.dtype else changed.to(x.dtype)


class Scaling:
    """An edit that scales, and optionally shifts, every feature, also of routed neurons."""

    def __init__(
        self,
        scales: Tensor | Callable[[], Tensor],
        shifts: Tensor | Callable[[], Tensor] | None = None,
    ) -> None:
        """Scale by `scales` [features], by a row of its own for each row of the batch [rows, features], or by
        the result of a function that is called when the edit runs. Then add `shifts`, which are given in the
        same ways; None adds nothing.
        """
        self._scales = scales
        self._shifts = shifts

    def scales(self, like: Tensor) -> Tensor:
        """The scales, on the device of a tensor."""
        return _now(self._scales).to(like.device)

    def shifts(self, like: Tensor) -> Tensor | None:
        """The shifts, on the device of a tensor; None where nothing is added."""
        return None if self._shifts is None else _now(self._shifts).to(like.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Scale the input [rows, tokens, features] of a linear layer."""
        scales = self.scales(x)
        scales = scales if scales.ndim == 1 else scales[:, None]
        shifts = self.shifts(x)
        if shifts is None:
            return scale(x, scales)
        return scale_and_shift(x, scales, shifts if shifts.ndim == 1 else shifts[:, None])

    def routed(self, part: Routed) -> Tensor:
        """Scale and shift the activations of routed tokens."""
        scales, shifts = part.of_pairs(self.scales(part.values)), self.shifts(part.values)
        if shifts is None:
            return scale(part.values, scales)
        return scale_and_shift(part.values, scales, part.of_pairs(shifts))


def _now(numbers: Tensor | Callable[[], Tensor]) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else numbers()


def patch_positions(
    x: Float[Tensor, "*batch tokens width"],
    clean: Float[Tensor, "*batch tokens width"],
    positions: Int[Tensor, " chosen"],
) -> Float[Tensor, "*batch tokens width"]:
    """Activation patching (V-SEAM 2): copy the clean activations to the chosen token positions."""
    edited = x.clone()
    edited[..., positions, :] = clean[..., positions, :]
    return edited
