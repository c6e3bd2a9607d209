"""Token positions of a prompt: image tokens, text tokens, their roles, and matches between inputs."""

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
# Inputs of some families that decide which part of the image each image token represents.
LAYOUT = ("image_grid_thw", "image_sizes")

Roles = Mapping[str, Sequence[str]]
"""The words of a prompt for every role, such as `object` or `attribute`."""


class MisalignedError(HonesError):
    """The tokens of two inputs do not correspond."""


Corresponding = tuple[tuple[int, int], ...]


class Places(NamedTuple):
    """Corresponding positions of an edited and a clean input, as pairs (edited, clean).

    `image` is a message instead where the image tokens do not correspond.
    """

    image: Corresponding | str
    text: Corresponding


def align(anatomy: Anatomy, clean: Mapping[str, Any], edited: Mapping[str, Any]) -> Places:
    """Find the corresponding token positions of two inputs; padding is left out.

    Text corresponds when the text tokens are equal in order. Images correspond when they have the same number
    of image tokens and the same layout.

    Raises: MisalignedError when the text differs.
    """
    (image, text), (other_image, other_text) = (positions(anatomy, inputs) for inputs in (edited, clean))
    tokens, other_tokens = edited["input_ids"][0, text], clean["input_ids"][0, other_text]
    if not torch.equal(tokens, other_tokens):
        raise MisalignedError(
            f"the prompts differ: {len(other_tokens)} tokens with the clean image and {len(tokens)} with "
            "the edited image, and they are not equal"
        )
    pairs = tuple(zip(text.tolist(), other_text.tolist(), strict=True))
    if len(image) != len(other_image):
        reason = f"the clean image has {len(other_image)} image tokens and the edited image has {len(image)}"
        return Places(reason, pairs)
    for name in LAYOUT:
        if name in clean and not torch.equal(clean[name], edited[name].to(clean[name])):
            return Places(f"the images differ in size ({name}), so their tokens do not correspond", pairs)
    return Places(tuple(zip(image.tolist(), other_image.tolist(), strict=True)), pairs)


def positions(anatomy: Anatomy, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The positions of image tokens and of text tokens in a batch of one."""
    image = anatomy.image_positions(inputs)[0].cpu()
    mask = inputs.get("attention_mask")
    present = torch.ones_like(image) if mask is None else mask[0].bool().cpu()
    return image.nonzero()[:, 0], (present & ~image).nonzero()[:, 0]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the decoded string, spaces included."""
    numbers = [int(token) for token in ids]
    texts = [
        str(tokenizer.decode(numbers[:end], clean_up_tokenization_spaces=False))
        for end in range(len(numbers) + 1)
    ]
    return [after[len(before) :] for before, after in pairwise(texts)]


def token_roles(tokens: Sequence[str], words: Roles) -> list[str]:
    """Give every token a role: the role of the word it belongs to, `last token`, or else its own text.

    Words match as whole words, in any case, with or without a plural ending. The first matching role wins.
    """
    text = "".join(tokens)
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    roles: dict[int, str] = {}
    for role, role_words in words.items():
        for word in filter(None, role_words):
            for found in re.finditer(rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)", text, re.IGNORECASE):
                for i, end in enumerate(ends):
                    if found.start() < end and end - len(tokens[i]) < found.end() and tokens[i].strip():
                        roles.setdefault(i, role)
    named = [roles.get(i, token.strip() or repr(token)) for i, token in enumerate(tokens)]
    return [*named[:-1], LAST]
