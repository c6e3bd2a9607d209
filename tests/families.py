"""Tiny random vision-language models of every served family, built from configurations and never downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from family_recipes import RECIPES
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

NAMES = tuple(RECIPES)
TIED_BY_DEFAULT = frozenset[str]({"gemma3", "paligemma", "internvl", "qwen2_vl"})


@dataclass(frozen=True)
class Family:
    """A small random model in eval mode with the processor that makes its inputs."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    in_prompt: str
    several_images: bool

    @property
    def tokenizer(self):  # noqa: ANN201
        return self.processor.tokenizer

    def prompt(self, text: str, pictures: int) -> str:
        """Put ``text`` behind ``pictures`` pictures, in the family's chat format where it has one."""
        if self.processor.chat_template is None:
            return self.in_prompt * pictures + text
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def inputs(
        self,
        text: str | Sequence[str],
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """Give what the processor makes of one question and its pictures, or of a batch of questions with theirs."""
        texts, pictures = ([text], [list(images)]) if isinstance(text, str) else (list(text), list(images))
        prompts = [self.prompt(one, len(shown)) for one, shown in zip(texts, pictures, strict=True)]
        flat = [picture for shown in pictures for picture in shown]
        made = self.processor(
            text=prompts,
            images=flat or None,
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
    """Build the family ``name`` with weights drawn from ``seed``; ``tied`` shares embedding and unembedding."""
    recipe = RECIPES[name](name in TIED_BY_DEFAULT if tied is None else tied)
    recipe.config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.model_class(recipe.config)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    draw_weights(model, seed)
    _quiet_special_tokens(model, recipe.processor.tokenizer)
    _set_generation(model, recipe.processor.tokenizer)
    # Buffers (rotary frequencies) stay in float32, as they do in a checkpoint loaded in another dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Family(name, model.eval(), recipe.processor, recipe.in_prompt, recipe.several_images)


def save_checkpoint(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write model, processor, tokenizer and chat template such that ``from_pretrained`` and lmms-eval load them."""
    family = build(name, seed=seed)
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw every parameter from ``seed``, large enough that a single head or neuron changes greedy answers."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            spread = 1.0 if id(parameter) in embeddings else 1.5 / fan_in**0.5
            parameter.copy_(noise * spread)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:  # norm gains, which start at 1 or, in Gemma, at 0
            parameter.add_(noise * 0.2)


@torch.no_grad()
def _quiet_special_tokens(model: PreTrainedModel, tokenizer) -> None:  # noqa: ANN001
    """Let the model end its answers now and then, and never write an image token or another marker."""
    rows = model.get_output_embeddings().weight
    rows[sorted(set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id})] = 0
    rows[tokenizer.eos_token_id] *= 1.5


def _set_generation(model: PreTrainedModel, tokenizer) -> None:  # noqa: ANN001
    for part in (model, getattr(model, "language_model", None)):
        if isinstance(part, PreTrainedModel):
            part.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
