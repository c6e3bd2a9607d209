"""Pure tensor readings: probabilities, write-in contributions, lens. No hooks and no models here."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sequence_log_probability(
    logits: Float[Tensor, "rows tokens vocabulary"], target: Int[Tensor, " tokens"]
) -> Float[Tensor, " rows"]:
    """Sum over a target's tokens of their log-probability, natural logarithm, in float32.

    `logits[:, i]` are those from which token `i` of the target is predicted.
    """
    logs = torch.log_softmax(logits.float(), dim=-1)
    return logs.gather(-1, target.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1).sum(-1)


def target_margin(
    logits: Float[Tensor, "tokens vocabulary"], target: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Sum over a target's tokens of their logit minus the largest other one, in float32.

    Unlike the log-probability it does not flatten where a model is sure of the target.
    """
    logits, chosen = logits.float(), target.unsqueeze(-1)
    others = logits.scatter(-1, chosen, -torch.inf).amax(-1)
    return (logits.gather(-1, chosen).squeeze(-1) - others).sum()


def answer_probability(
    logits: Float[Tensor, "rows vocabulary"], answer_ids: Int[Tensor, " ids"]
) -> Float[Tensor, " rows"]:
    """Next-token probability of an answer: the sum over its ids, softmax in float32 (V-SEAM 3)."""
    return torch.softmax(logits.float(), dim=-1)[:, answer_ids].sum(-1)


def logit_difference(
    logits: Float[Tensor, "rows vocabulary"],
    correct_ids: Int[Tensor, " correct"],
    wrong_ids: Int[Tensor, " wrong"],
) -> Float[Tensor, " rows"]:
    """Mean logit of the correct answer's ids minus that of the wrong answer's (V-SEAM 2)."""
    return logits[:, correct_ids].float().mean(-1) - logits[:, wrong_ids].float().mean(-1)


def target_direction(
    unembedding: Float[Tensor, "vocabulary hidden"],
    target_ids: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " hidden"]:
    """Unit vector `u_y` of a target: the weighted sum of its tokens' unembedding rows (HONES 2).

    Repeated tokens count as often as they stand there. Computed in float32.
    """
    ids = torch.as_tensor(target_ids, device=unembedding.device)
    rows = unembedding[ids].float()
    if weights is not None:
        rows = rows * torch.as_tensor(weights, device=rows.device, dtype=torch.float32)[:, None]
    total = rows.sum(0)
    norm = total.norm()
    if not bool(norm > 0):
        raise ValueError("the target's unembedding rows add up to zero: it has no direction to write into")
    unit: Tensor = total / norm
    return unit


def write_in(
    activations: Float[Tensor, "*batch neurons"], write_gain: Float[Tensor, " neurons"]
) -> Float[Tensor, "*batch neurons"]:
    """Write-in contribution `z_i * <W_down[:, i], u_y>` of every neuron (HONES 2), in float32.

    `write_gain` is `W_down^T u_y`, see `write_gain`.
    """
    return activations.float() * write_gain


def write_gain(
    down: Float[Tensor, "hidden neurons"], direction: Float[Tensor, " hidden"]
) -> Float[Tensor, " neurons"]:
    """What one unit of every neuron writes along a direction: `W_down^T u_y`, in float32."""
    return torch.mv(down.float().T, direction.to(down.device))
