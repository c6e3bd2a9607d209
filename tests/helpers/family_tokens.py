"""A small byte-level tokenizer, trained in memory, with the special tokens that each family needs."""

from collections.abc import Mapping
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = """
yes no cat dog bird horse car bus boat tree house man woman child ball cup chair table plate pizza apple
red green blue yellow white black brown pink one two three four five six left right top bottom
circle square triangle star large small wood metal glass sitting standing running holding wearing
the a an is are in on of with and to it this that what where how many colour color does do image picture
question answer word phrase short single Yes No What Is Are How Question Answer USER ASSISTANT User Assistant
"""
PRINTABLE = [chr(code) for code in range(33, 127)] + [
    "Ġ",
    "Ċ",
]  # byte-level names of ASCII, space and newline


def make_tokenizer(
    special: Mapping[str, str], *, others: tuple[str, ...] = (), bos_first: bool = False
) -> PreTrainedTokenizerFast:
    """Give a tokenizer of a few hundred tokens.

    ``special`` maps attribute names (``bos_token``, ``image_token``, ...) to token texts; ``others`` are
    special tokens without a name. ``bos_first`` puts the first of them before every text, as Llama does.
    """
    base = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    named = {**base, **special}
    backend = Tokenizer.from_str(_trained(tuple(dict.fromkeys([*named.values(), *others]))))
    if bos_first:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    usual = {name: named[name] for name in base}
    extra = {name: token for name, token in named.items() if name not in base}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=512,
        padding_side="left",
        extra_special_tokens=extra,
        **usual,
    )


@lru_cache
def _trained(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(PRINTABLE) + 380,
        special_tokens=list(special),
        initial_alphabet=PRINTABLE,
        limit_alphabet=len(PRINTABLE),
        show_progress=False,
    )
    # Words in front come first and follow a space elsewhere: both spellings become tokens.
    corpus = [f"{word} {word}" for word in WORDS.split() for _ in range(4)]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()
