"""Tiny random vision-language models of every served family, built from configs and never downloaded.

Of all: layers at ``LM.layers.N``, with ``self_attn.o_proj`` and ``mlp.down_proj``, called with the hidden
states as the one positional argument and giving a tensor. Vision towers and connectors have projections of
these names too (Qwen2.5-VL, GLM4V, Idefics2), so the names alone do not tell a decoder. Pictures take the
place of ``config.image_token_id`` in ``input_ids``. 4 query heads, KV key-value heads; the unembedding is
``lm_head`` (InstructBLIP: ``language_model.lm_head``).

=============== ==================== == ==== =============================================================
family          LM                   KV tied what is special
=============== ==================== == ==== =============================================================
llava           model.language_model 4  no   Llama, CLIP; 9 tokens a picture
llava_next      model.language_model 2  no   Mistral; tiles and new lines, 10 to 12 tokens; ``image_sizes``
llava_onevision model.language_model 2  no   Qwen2, SigLIP; tiles; ``image_sizes``, ``batch_num_images``
qwen2_vl        model.language_model 2  yes  3-D positions from ``mm_token_type_ids``, ``image_grid_thw``
qwen2_5_vl      model.language_model 2  no   the same; windows in the vision tower
qwen3_vl        model.language_model 2  no   the same; q/k norms; deep-stack adds to the output of layers 0, 1
internvl        model.language_model 2  yes  Qwen2; one row of ``pixel_values`` a tile
gemma3          model.language_model 2  yes  head width 16 where hidden / heads is 12; norms 1 + w, also after
                                             each block, and of q/k; layers 0 and 2 slide; the tokens of one
                                             picture (``token_type_ids`` 1) see each other
paligemma       model.language_model 2  yes  Gemma 2: norms and width as above without q/k; layers 0 and 2
                                             slide; caps on attention (5; hence eager) and on logits (3); the
                                             whole prompt (``token_type_ids`` 0) sees itself, an answer (1) is
                                             causal; positions from 1
idefics2        model.text_model     2  no   Mistral; 6 latents a picture from a perceiver; pixel masks
idefics3        model.text_model     2  no   Llama; 4 tokens a picture; pixel masks
smolvlm         model.text_model     2  no   Llama; 5 tiles of 4 tokens a picture; processor: num2words
glm4v           model.language_model 2  no   fused ``gate_up_proj``; norms after each block; half of each head
                                             rotates; 3-D positions
instructblip    language_model.model 4  no   Llama; a Q-Former reads the question too; picture tokens stand in
                                             front of any padding
=============== ==================== == ==== =============================================================

All but InstructBLIP run without pictures, though PaliGemma's processor wants one (it also gives ``labels``).
``model.generate(**inputs)`` works for all; InstructBLIP's repeats the prompt in front of the answer.

Padding on the left changes nothing, but for InstructBLIP: its Q-Former has learned positions, and its padding
stands between picture and text, so a forward pass wants the ``position_ids`` that ``generate`` makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from family_gemma import gemma3, paligemma
from family_idefics import idefics2, idefics3, smolvlm
from family_llava import instructblip, internvl, llava, llava_next, llava_onevision
from family_parts import Recipe
from family_qwen import glm4v, qwen2_5_vl, qwen2_vl, qwen3_vl
from family_refused import REFUSED, SERVED
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

RECIPES: dict[str, Callable[[bool], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(llava, llava_next, llava_onevision),
        *(qwen2_vl, qwen2_5_vl, qwen3_vl),
        *(internvl, gemma3, paligemma),
        *(idefics2, idefics3, smolvlm),
        *(glm4v, instructblip),
    )
}
NAMES = tuple(RECIPES)
REFUSED_NAMES = tuple(REFUSED)
WRAPPERS = {  # family: lmms-eval's stock wrapper and the arguments that it needs on a CPU, beside pretrained=
    "llava": ("llava_hf", "device=cpu,device_map=cpu,dtype=float32"),
    "llava_next": ("llava_hf", "device=cpu,device_map=cpu,dtype=float32"),
    "llava_onevision": ("llava_hf", "device=cpu,device_map=cpu,dtype=float32"),
    "qwen2_vl": ("qwen2_vl", "device=cpu,device_map=cpu,min_pixels=3136,max_pixels=7056"),
    "qwen2_5_vl": ("qwen2_5_vl", "device=cpu,device_map=cpu,min_pixels=3136,max_pixels=7056"),
    "qwen3_vl": ("qwen3_vl", "device=cpu,device_map=cpu,min_pixels=4096,max_pixels=9216"),
    "internvl": ("internvl_hf", "device=cpu,device_map=cpu,max_patches=2"),
    "gemma3": ("gemma3", "device=cpu,device_map=cpu"),
    "idefics2": ("idefics2", "device=cpu,device_map=cpu,dtype=float32"),
    "instructblip": ("instructblip", "device=cpu"),
}
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
        if not self.several_images and max(map(len, pictures)) > 1:
            raise ValueError(f"{self.name} takes one picture a prompt, got {[len(p) for p in pictures]}")
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


def build_refused(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a model of `family_refused`, without a processor."""
    return make_model(*(REFUSED | SERVED)[name](), seed)


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
