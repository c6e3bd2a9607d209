"""The tokens with which a model would continue a prompt to give an answer."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hones_eval.errors import HonesError, UnsupportedModelError

TAIL = 24
"""How many tokens at the end of a prompt can influence how the following text is cut into tokens."""
HOLDERS = ("", "processor", "_processor", "_image_processor", "image_processor")


def tokenizer_of(wrapper: Any) -> PreTrainedTokenizerBase:
    """The tokenizer with which an lmms-eval model decodes answers.

    Raises: UnsupportedModelError when it has none.
    """
    for holder in HOLDERS:
        found = getattr(getattr(wrapper, holder, None) if holder else wrapper, "tokenizer", None)
        if isinstance(found, PreTrainedTokenizerBase):
            return found
    raise UnsupportedModelError(
        f"{type(wrapper).__name__} has no `.tokenizer` (also looked on its processor), which is needed to "
        "encode answers"
    )


def next_token(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: str) -> int:
    """The first of `answer_tokens`."""
    return answer_tokens(tokenizer, prompt, answer)[0]


def answer_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: str) -> list[int]:
    """The tokens after a prompt when prompt and answer are encoded as one text; at least one.

    Encoding an answer alone gives other tokens: most tokenizers mark the start of a word or of a text. So the
    end of the prompt is decoded, encoded again with the answer, and cut off. A space is put before the
    answer, as in `ASSISTANT: Yes`, unless the prompt ends in white space or a special token.

    Args:
        tokenizer: the model's.
        prompt: token ids, image tokens included.
        answer: the answer in words.

    Raises: HonesError when the encoded text does not continue the prompt's own tokens.
    """
    tail, text = _tail(tokenizer, list(prompt))
    ends = not text or text[-1].isspace() or tail[-1] in tokenizer.all_special_ids
    whole = _encoded(tokenizer, text + ("" if ends else " ") + answer)
    if whole[: len(tail)] != tail or len(whole) == len(tail):
        raise HonesError(
            f"{type(tokenizer).__name__} encodes the end of the prompt {text[-20:]!r} differently when "
            f"{answer!r} follows, so the answer's first token is unknown"
        )
    return whole[len(tail) :]


def _tail(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> tuple[list[int], str]:
    """The longest end of a prompt whose text encodes to its own tokens again."""
    for size in range(min(TAIL, len(prompt)), 0, -1):
        tail = prompt[-size:]
        text = str(tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if _encoded(tokenizer, text) == tail:
            return tail, text
    raise HonesError(
        f"{type(tokenizer).__name__} does not encode the text of a prompt's last tokens to these tokens "
        "again, so the first token of an answer is unknown"
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found
