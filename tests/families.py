"""Tiny random vision-language models of every served family, built from configs and never downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from family_recipes import RECIPES, Recipe
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

NAMES = tuple(RECIPES)
TIED_BY_DEFAULT = frozenset[str]({"gemma3", "paligemma", "internvl", "qwen2_vl"})


@dataclass(frozen=True)
class Family:
    """A small random model in eval mode with the processor that makes its inputs."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    recipe: Recipe

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    @property
    def several_images(self) -> bool:
        return self.recipe.several_images

    def prompt(self, text: str, pictures: int) -> str:
        """Put ``text`` behind ``pictures`` pictures, in the family's chat format where it has one."""
        if self.processor.chat_template is None:
            return self.recipe.in_prompt * pictures + text
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def inputs(
        self,
        text: str | Sequence[str],
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """Give the processor's tensors for one text and its pictures, or for several texts with theirs."""
        texts, pictures = ([text], [list(images)]) if isinstance(text, str) else (list(text), list(images))
        prompts = [self.prompt(one, len(shown)) for one, shown in zip(texts, pictures, strict=True)]
        flat = [picture for shown in pictures for picture in shown]
        given = pictures if self.recipe.pictures_by_prompt else flat
        made = self.processor(
            text=prompts,
            images=given if flat else None,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        dtype = self.model.dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in made.items()}


def build(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    attn_implementation: str | None = None,
) -> Family:
    """Build the family ``name`` with weights from ``seed``; ``tied`` shares embedding and unembedding."""
    recipe = RECIPES[name](name in TIED_BY_DEFAULT if tied is None else tied)
    model = make_model(recipe.model_class, recipe.config, seed)
    tokenizer = recipe.processor.tokenizer
    _quiet_special_tokens(model, tokenizer)
    _set_generation(model, tokenizer)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    # Buffers (rotary frequencies) stay in float32, as they do in a checkpoint loaded in another dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return Family(name, model, recipe.processor, recipe)


def save_checkpoint(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write model, processor, tokenizer and chat template as ``from_pretrained`` and lmms-eval want them."""
    family = build(name, seed=seed)
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


def make_model(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Make a model in eval mode with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    _draw_weights(model, seed)
    return model.eval()


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw parameters large enough for a single head or neuron to change greedy answers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:  # norm gains, which start at 1 or, in Gemma, at 0
            parameter.add_(noise * 0.2)


@torch.no_grad()
def _quiet_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model end its answers now and then, and never write an image token or another marker."""
    rows = model.get_output_embeddings().weight
    if rows is model.get_input_embeddings().weight:
        # Otherwise the last token itself is always the likeliest next one.
        rows *= 0.25
        _final_norm(model).weight.add_(3.0)
    rows[sorted(set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id})] = 0
    rows[tokenizer.eos_token_id] *= 1.5


def _final_norm(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder().norm


def _set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for part in (model, getattr(model, "language_model", None)):
        if isinstance(part, PreTrainedModel):
            part.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
