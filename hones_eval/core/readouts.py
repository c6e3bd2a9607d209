"""Readouts as pure tensor functions: probabilities, margins and write-in contributions. No hooks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sequence_log_probability(
    logits: Float[Tensor, "rows tokens vocabulary"], target: Int[Tensor, " tokens"]
) -> Float[Tensor, " rows"]:
    """Sum of the log-probabilities of a target's tokens (natural logarithm, float32).

    Args:
        logits: `logits[:, i]` are the logits that predict token `i` of the target.
        target: the target's token ids.
    """
    logs = torch.log_softmax(logits.float(), dim=-1)
    return logs.gather(-1, target.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1).sum(-1)


def target_margin(
    logits: Float[Tensor, "*rows tokens vocabulary"], target: Int[Tensor, " tokens"]
) -> Float[Tensor, "*rows"]:
    """Sum over a target's tokens of the token's logit minus the largest other logit, in float32.

    Unlike the log-probability, the margin does not saturate when the model is certain of the target.
    """
    logits, chosen = logits.float(), target.expand(logits.shape[:-1]).unsqueeze(-1)
    others = logits.scatter(-1, chosen, -torch.inf).amax(-1)
    return (logits.gather(-1, chosen).squeeze(-1) - others).sum(-1)


def answer_probability(
    logits: Float[Tensor, "rows vocabulary"], answer_ids: Int[Tensor, " ids"]
) -> Float[Tensor, " rows"]:
    """Next-token probability of an answer, summed over its ids, softmax in float32 (V-SEAM 3)."""
    return torch.softmax(logits.float(), dim=-1)[:, answer_ids].sum(-1)


def logit_difference(
    logits: Float[Tensor, "rows vocabulary"],
    correct_ids: Int[Tensor, " correct"],
    wrong_ids: Int[Tensor, " wrong"],
) -> Float[Tensor, " rows"]:
    """Mean logit of the correct answer's ids minus the mean logit of the wrong answer's ids (V-SEAM 2)."""
    return logits[:, correct_ids].float().mean(-1) - logits[:, wrong_ids].float().mean(-1)


def target_direction(
    unembedding: Float[Tensor, "vocabulary hidden"],
    target_ids: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " hidden"]:
    """Direction of a target (HONES 2): the weighted sum of its tokens' unembedding rows as a unit vector.

    `u_y = sum_t w_t U[t] / ||sum_t w_t U[t]||`, computed in float32. A repeated token counts each time.

    Args:
        unembedding: the unembedding matrix `U`.
        target_ids: the target's token ids.
        weights: one weight per token; None weighs all tokens equally.

    Raises: ValueError when the rows add up to zero.
    """
    ids = torch.as_tensor(target_ids, device=unembedding.device)
    rows = unembedding[ids].float()
    if weights is not None:
        rows = rows * torch.as_tensor(weights, device=rows.device, dtype=torch.float32)[:, None]
    total = rows.sum(0)
    norm = total.norm()
    if not bool(norm > 0):
        raise ValueError("the target's unembedding rows add up to zero, so the target has no direction")
    unit: Tensor = total / norm
    return unit


def write_in(
    activations: Float[Tensor, "*batch neurons"], write_gain: Float[Tensor, " neurons"]
) -> Float[Tensor, "*batch neurons"]:
    """Write-in contribution `z_i * <W_down[:, i], u_y>` of every neuron (HONES 2), in float32.

    Args:
        activations: `z`, the input of `down_proj`.
        write_gain: `W_down^T u_y`, from the function `write_gain`.
    """
    return activations.float() * write_gain


def write_gain(
    down: Float[Tensor, "hidden neurons"], direction: Float[Tensor, " hidden"]
) -> Float[Tensor, " neurons"]:
    """Amount that one unit of each neuron's activation writes along a direction: `W_down^T u_y`, float32."""
    return torch.mv(down.float().T, direction.to(down.device))
