"""Pure tensor edits. No hooks and no models here: tensors in, tensors out, inputs untouched."""

from jaxtyping import Float, Int
from torch import Tensor


def mean_of_others(x: Float[Tensor, "*batch heads width"]) -> Float[Tensor, "*batch heads width"]:
    """For every head the mean of the other heads' outputs (HONES 1): zeros when there is one head."""
    heads = x.shape[-2]
    if heads == 1:
        return x.new_zeros(x.shape)
    return (x.sum(dim=-2, keepdim=True) - x) / (heads - 1)


def replace_head_by_mean(
    x: Float[Tensor, "*batch features"], head: int, heads: int
) -> Float[Tensor, "*batch features"]:
    """The input of `o_proj` with one head's slice replaced by the mean of the others."""
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
    """As `replace_head_by_mean`, but in row `rows[i]` of the batch head `chosen[i]`; other rows stay."""
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
    """In row `rows[i]` of the batch the slice of head `chosen[i]` becomes zero; other rows stay."""
    edited: Tensor = x.unflatten(-1, (heads, -1)).clone()
    edited[rows, :, chosen] = 0
    return edited.flatten(-2)


def zero_neurons_in_rows(
    x: Float[Tensor, "rows tokens features"], rows: Int[Tensor, " edited"], chosen: Int[Tensor, " edited"]
) -> Float[Tensor, "rows tokens features"]:
    """In row `rows[i]` of the batch neuron `chosen[i]` becomes zero; other rows stay."""
    edited = x.clone()
    edited[rows, :, chosen] = 0
    return edited


def scale(x: Float[Tensor, "*batch sites"], scales: Float[Tensor, " sites"]) -> Float[Tensor, "*batch sites"]:
    """Every site times its scale: HONES 4, V-SEAM 4, and masking where the scale is zero.

    Multiplied in the wider of the two types and then rounded to that of `x`: in bfloat16 a scale closer to 1
    than 0.4 percent would itself round to 1 and do nothing.
    """
    product = x * scales
    return product if product.dtype == x.dtype else product.to(x.dtype)


def put_back(
    x: Float[Tensor, "*batch tokens width"],
    clean: Float[Tensor, "*batch tokens width"],
    positions: Int[Tensor, " chosen"],
) -> Float[Tensor, "*batch tokens width"]:
    """Activation patching (V-SEAM 2): at the chosen token positions the clean activations."""
    edited = x.clone()
    edited[..., positions, :] = clean[..., positions, :]
    return edited
