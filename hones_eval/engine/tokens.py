"""Tokens of a prompt: which are the picture's, which two inputs share, and what part each plays."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.core.anatomy import Anatomy
from hones_eval.errors import HonesError

LAST = "last token"
# Families give these beside pixels; they decide which place of the picture an image token stands for.
LAYOUT = ("image_grid_thw", "image_sizes")

Roles = Mapping[str, Sequence[str]]
"""The words of a prompt that play a role, such as `object` or `attribute`."""


class MisalignedError(HonesError):
    """The tokens of two inputs do not correspond."""


Corresponding = tuple[tuple[int, int], ...]


class Places(NamedTuple):
    """Positions in the edited input with those in the clean input that stand for the same: of image tokens,
    or why they do not correspond, and of text tokens.
    """

    image: Corresponding | str
    text: Corresponding


def align(anatomy: Anatomy, clean: Mapping[str, Any], edited: Mapping[str, Any]) -> Places:
    """Which tokens of two inputs correspond. Padding belongs to neither.

    Text corresponds when its tokens are the same, one by one; images when they take the same number of
    tokens and the same layout.

    Raises: MisalignedError when the text differs.
    """
    (image, text), (other_image, other_text) = (positions(anatomy, one) for one in (edited, clean))
    tokens, other_tokens = edited["input_ids"][0, text], clean["input_ids"][0, other_text]
    if not torch.equal(tokens, other_tokens):
        raise MisalignedError(
            f"its prompts differ: {len(other_tokens)} text tokens with the clean picture, {len(tokens)} with "
            "the edited one, not all the same"
        )
    pairs = tuple(zip(text.tolist(), other_text.tolist(), strict=True))
    if len(image) != len(other_image):
        reason = f"the clean picture takes {len(other_image)} image tokens, the edited one {len(image)}"
        return Places(reason, pairs)
    for name in LAYOUT:
        if name in clean and not torch.equal(clean[name], edited[name].to(clean[name])):
            return Places(f"the pictures differ in size ({name}), so image tokens do not correspond", pairs)
    return Places(tuple(zip(image.tolist(), other_image.tolist(), strict=True)), pairs)


def positions(anatomy: Anatomy, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Where image tokens and text tokens stand in a batch of one."""
    image = anatomy.image_positions(inputs)[0].cpu()
    mask = inputs.get("attention_mask")
    there = torch.ones_like(image) if mask is None else mask[0].bool().cpu()
    return image.nonzero()[:, 0], (there & ~image).nonzero()[:, 0]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text, spaces included."""
    numbers = [int(one) for one in ids]
    texts = [
        str(tokenizer.decode(numbers[:end], clean_up_tokenization_spaces=False))
        for end in range(len(numbers) + 1)
    ]
    return [after[len(before) :] for before, after in pairwise(texts)]


def token_roles(tokens: Sequence[str], words: Roles) -> list[str]:
    """A role for every token: that of the word it is part of, `last token`, or else its own text.

    Words match as whole words, whatever their case, with a plural's ending; the first role that fits counts.
    """
    text = "".join(tokens)
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    roles: dict[int, str] = {}
    for role, some in words.items():
        for word in filter(None, some):
            for found in re.finditer(rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)", text, re.IGNORECASE):
                for i, end in enumerate(ends):
                    if found.start() < end and end - len(tokens[i]) < found.end() and tokens[i].strip():
                        roles.setdefault(i, role)
    named = [roles.get(i, token.strip() or repr(token)) for i, token in enumerate(tokens)]
    return [*named[:-1], LAST]
