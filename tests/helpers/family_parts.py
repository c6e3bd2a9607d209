"""What the recipes of the families share."""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


class Recipe(NamedTuple):
    """What a family is made of. ``in_prompt`` stands for one picture where there is no chat template."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    processor: ProcessorMixin
    in_prompt: str = ""
    several_images: bool = True
    pictures_by_prompt: bool = False  # whether its processor wants a list of pictures for each prompt


def chat_template(picture: str, user: str, assistant: str, after: str) -> str:
    """Give a Jinja chat template: ``user`` and ``assistant`` open a turn, ``after`` closes it."""
    return (
        "{% for message in messages %}"
        f"{{{{ '{assistant}' if message['role'] == 'assistant' else '{user}' }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ '{picture}' }}}}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        f"{{{{ '{after}' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
    )


def im_template(picture: str) -> str:
    turn = chat_template(picture, "<|im_start|>user\\n", "<|im_start|>assistant\\n", "<|im_end|>\\n")
    return turn.replace("'<|im_start|>user\\n'", "'<|im_start|>' + message['role'] + '\\n'")


def decoder(tokenizer: PreTrainedTokenizerFast, tied: bool, **changes: Any) -> dict[str, Any]:
    """Give the settings of a small language model, in the names that most families share."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**common, **changes}
