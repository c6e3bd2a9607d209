"""Language models that read text alone, for `hones_hf`: how they are loaded and prompted."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hones_eval.errors import HonesError

from .hf_requests import Messages, images, texts


def model_class(pretrained: str, revision: str, trust_remote_code: bool) -> Any:
    """The class that loads a checkpoint: of vision-language models, or of decoder-only language models.

    Raises: HonesError for a checkpoint that is neither. OSError when it has no configuration.
    """
    config = AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=trust_remote_code)
    if trust_remote_code or _known(AutoModelForImageTextToText, config):
        return AutoModelForImageTextToText
    if _known(AutoModelForCausalLM, config):
        return AutoModelForCausalLM
    raise HonesError(
        f"{pretrained} is of the type {config.model_type}, which in transformers is neither a "
        "vision-language model nor a decoder-only language model"
    )


def _known(auto: Any, config: PreTrainedConfig) -> bool:
    return type(config) in auto._model_mapping


def load_processor(pretrained: str, revision: str, trust_remote_code: bool) -> "TextProcessor":
    """The prompting of a language model's checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(
        pretrained, revision=revision, trust_remote_code=trust_remote_code
    )
    return TextProcessor(tokenizer)


class TextProcessor:
    """A tokenizer in the place of a vision-language model's processor.

    Chat models are prompted through their chat template. Base models have none: they read the question as the
    task writes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prompt with this tokenizer."""
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        """The tokenizer's chat template; None for a base model."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.tokenizer.chat_template = template

    def apply_chat_template(
        self, conversations: Sequence[Messages], processor_kwargs: dict[str, Any], **options: Any
    ) -> BatchFeature:
        """The inputs of a batch of conversations, as a processor's method of that name gives them."""
        plain = [
            [{"role": turn["role"], "content": "\n".join(texts([turn]))} for turn in messages]
            for messages in _without_images(conversations)
        ]
        found: Any = self.tokenizer.apply_chat_template(plain, **options, **processor_kwargs)
        return BatchFeature(dict(found))

    def plain_inputs(self, conversations: Sequence[Messages]) -> BatchFeature:
        """The inputs of a batch of questions for a model without a chat template."""
        prompts = ["\n".join(texts(messages)) for messages in _without_images(conversations)]
        found = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        return BatchFeature({name: found[name] for name in ("input_ids", "attention_mask")})


def _without_images(conversations: Sequence[Messages]) -> Sequence[Messages]:
    if any(images(messages) for messages in conversations):
        raise HonesError(
            "this question shows an image, and the model reads text alone: use a vision-language model, or a "
            "task without images"
        )
    return conversations
