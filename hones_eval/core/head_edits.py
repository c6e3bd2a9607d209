"""Head edits: the values that replace the output of one head, registered by name.

A head's output is its slice of the input of `o_proj`. An edit is one pure function that gives a replacement
for every head of a layer; `rank --edit NAME` then replaces one head at a time. To add an edit, write its
function here, add its row to `HEAD_EDITS`, and compare it with a plain loop in `tests/test_head_edits.py`.

An edit must be position-free: the replacement at one token may depend on the heads' outputs at that token,
and on nothing else of the sequence. Replay, shared prefixes and decoding rely on it, because they run parts
of a prompt, or one new token, at a time. `head_edit` checks it on random values.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from hones_eval.errors import HonesError

if TYPE_CHECKING:  # so that `--help` can list the edits without torch
    from torch import Tensor


class HeadEdit(NamedTuple):
    """One registered edit.

    `replacement(x, other)` gives the replacements [*batch, heads, width] of all heads, from their outputs `x`
    [*batch, heads, width] and, where `needs_other`, from the outputs `other` [heads, width] of the same layer
    at the last prompt token of another example. `help` completes the sentence "a head is replaced by ...".
    """

    help: str
    replacement: "Callable[[Tensor, Tensor | None], Tensor]"
    needs_other: bool = False


def by_mean(x: "Tensor", other: "Tensor | None" = None) -> "Tensor":
    """The mean of the layer's other heads at the same token (HONES 1, V-SEAM 3)."""
    from hones_eval.core.edits import mean_of_others

    return mean_of_others(x)


def by_zero(x: "Tensor", other: "Tensor | None" = None) -> "Tensor":
    """Zeros."""
    return x.new_zeros(x.shape)


def by_resampling(x: "Tensor", other: "Tensor | None" = None) -> "Tensor":
    """The head's own output at the last prompt token of another example, the same at every token."""
    if other is None:
        raise HonesError("a resampled head needs the head outputs of another example")
    return other.to(x).expand_as(x)


HEAD_EDITS: dict[str, HeadEdit] = {
    "mean": HeadEdit("the mean of the layer's other heads", by_mean),
    "zero": HeadEdit("zeros", by_zero),
    "resample": HeadEdit("its output for another example's last prompt token", by_resampling, True),
}


if TYPE_CHECKING:
    HeadEditName = str
else:  # the choices of --edit
    HeadEditName = Literal[tuple(HEAD_EDITS)]


def described() -> str:
    """All edits with their help, as `--help` shows them."""
    return "; ".join(f"{name} ({row.help})" for name, row in HEAD_EDITS.items())


@cache
def head_edit(name: str) -> HeadEdit:
    """Look up a registered edit, and check that it is position-free.

    Raises: HonesError for an unknown name, and for an edit that keeps no shape or is not position-free.
    """
    if name not in HEAD_EDITS:
        raise HonesError(f"--edit {name} is not known: choose one of {', '.join(HEAD_EDITS)}")
    edit = HEAD_EDITS[name]
    check_position_free(name, edit)
    return edit


def check_position_free(name: str, edit: HeadEdit) -> None:
    """Check by an experiment that an edit treats each token alone.

    Raises: HonesError when the replacement at a token changes with the tokens around it or with its position.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 3, generator=generator)  # rows, tokens, heads, width
    other = torch.randn(4, 3, generator=generator)
    whole = edit.replacement(x, other)
    alone = torch.stack([edit.replacement(x[:, [i]], other)[:, 0] for i in range(x.shape[1])], dim=1)
    if whole.shape != x.shape:
        raise HonesError(f"head edit {name} turns {tuple(x.shape)} into {tuple(whole.shape)}: keep the shape")
    backwards = edit.replacement(x.flip(1), other).flip(1)
    if not torch.allclose(whole, alone, atol=1e-6) or not torch.allclose(whole, backwards, atol=1e-6):
        raise HonesError(
            f"head edit {name} is not position-free: its replacement at one token depends on other tokens or "
            "on the position, which replay and decoding cannot reproduce"
        )


def replace_heads_in_rows(
    x: "Tensor",
    rows: "Tensor",
    chosen: "Tensor",
    heads: int,
    edit: HeadEdit,
    other: "Tensor | None" = None,
) -> "Tensor":
    """Apply an edit to head `chosen[i]` in row `rows[i]` of a batch. Other rows are unchanged.

    Args:
        x: the input of `o_proj` [rows, tokens, features].
        rows: row numbers [edited]; a row may occur several times.
        chosen: head numbers [edited].
        heads: heads of the layer.
        edit: the edit; each replacement is computed from the unedited heads.
        other: see `HeadEdit`.
    """
    split: Tensor = x.unflatten(-1, (heads, -1))
    edited = split.clone()
    edited[rows, :, chosen] = edit.replacement(split[rows], other)[range(len(rows)), :, chosen]
    return edited.flatten(-2)
