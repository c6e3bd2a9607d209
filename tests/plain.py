"""A slow reference of both methods: one head, one item, one full forward or one full decoding at a time.

Written from the formulas alone, with loops and with hooks of its own, so that agreement means something.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Head = tuple[int, int]
LANGUAGE_MODELS = {
    "Idefics2ForConditionalGeneration": "model.text_model",
    "Idefics3ForConditionalGeneration": "model.text_model",
    "SmolVLMForConditionalGeneration": "model.text_model",
    "InstructBlipForConditionalGeneration": "language_model.model",
}


class Pass(NamedTuple):
    """One full forward: logits [tokens, vocabulary] and per layer the FFN activations [tokens, I]."""

    logits: Tensor
    neurons: list[Tensor]


class Item(NamedTuple):
    """One question: what `forward` takes, the other arguments of `generate`, the answer's tokens."""

    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    target: Sequence[int]


def language_model(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(LANGUAGE_MODELS.get(type(model).__name__, "model.language_model"))


def layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(language_model(model).layers)


def all_heads(model: PreTrainedModel) -> list[Head]:
    heads = language_model(model).config.num_attention_heads
    return [(layer, head) for layer in range(len(layers(model))) for head in range(heads)]


def replaced_by_mean(x: Tensor, head: int, heads: int) -> Tensor:
    """Head by head: the slice of one is the sum of the others' over their number, or zeros if alone."""
    width = x.shape[-1] // heads
    total = torch.zeros_like(x[..., :width])
    for other in range(heads):
        if other != head:
            total = total + x[..., other * width : (other + 1) * width]
    edited = x.clone()
    edited[..., head * width : (head + 1) * width] = total / (heads - 1) if heads > 1 else 0
    return edited


@contextmanager
def head_replaced(model: PreTrainedModel, head: Head | None) -> Iterator[None]:
    if head is None:
        yield
        return
    heads = language_model(model).config.num_attention_heads

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (replaced_by_mean(args[0], head[1], heads),)

    handle = layers(model)[head[0]].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def forward(model: PreTrainedModel, inputs: Mapping[str, Any], head: Head | None = None) -> Pass:
    """One item through the whole model, with one head replaced or none."""
    kept: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0][0].clone()))
        for layer in layers(model)
    ]
    try:
        with head_replaced(model, head):
            logits = model(**inputs).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return Pass(logits, kept)


@torch.no_grad()
def answer(model: PreTrainedModel, item: Item, head: Head | None = None) -> list[int]:
    """New tokens of `generate`, the end token included."""
    with head_replaced(model, head):
        output = model.generate(**item.inputs, **item.settings)
    return output[0, item.inputs["input_ids"].shape[1] :].tolist()


def with_answer(model: PreTrainedModel, inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """The inputs with an answer behind the prompt: text, of type 1 in PaliGemma and of type 0 elsewhere."""
    new = torch.tensor([list(tokens)], dtype=torch.long)
    text_type = int("PaliGemma" in type(model).__name__)
    behind = {
        "input_ids": new,
        "attention_mask": torch.ones_like(new),
        "token_type_ids": torch.full_like(new, text_type),
        "mm_token_type_ids": torch.zeros_like(new),
    }
    longer = {name: torch.cat([inputs[name], part], 1) for name, part in behind.items() if name in inputs}
    return {**inputs, **longer}


def log_probability(model: PreTrainedModel, item: Item, head: Head | None = None) -> float:
    """Natural logarithm of the probability of the target's tokens behind the prompt."""
    prompt = item.inputs["input_ids"].shape[1]
    logits = forward(model, with_answer(model, item.inputs, item.target), head).logits
    total = 0.0
    for step, token in enumerate(item.target):
        total += float(torch.log_softmax(logits[prompt - 1 + step].float(), -1)[token])
    return total


def hones_heads(
    model: PreTrainedModel, items: Sequence[Item], metric: Callable[[list[list[int]]], float]
) -> tuple[Tensor, Tensor]:
    """Drops [L, H] of the metric over the whole set, and of the mean log-probability (HONES 1)."""
    base = metric([answer(model, item) for item in items])
    sure = [log_probability(model, item) for item in items]
    heads = all_heads(model)
    metric_drop, log_drop = (torch.zeros(heads[-1][0] + 1, heads[-1][1] + 1).double() for _ in range(2))
    for head in heads:
        metric_drop[head] = base - metric([answer(model, item, head) for item in items])
        drops = [one - log_probability(model, item, head) for one, item in zip(sure, items, strict=True)]
        log_drop[head] = sum(drops) / len(drops)
    return metric_drop, log_drop


def contributions(model: PreTrainedModel, item: Item, head: Head | None = None) -> Tensor:
    """`c = z * <W_down[:, i], u_y>` [L, I] at the last prompt token (HONES 2)."""
    unembedding = model.get_output_embeddings().weight.detach().double()
    direction = torch.zeros(unembedding.shape[1]).double()
    for token in item.target:
        direction += unembedding[token]
    direction /= torch.linalg.vector_norm(direction)
    neurons = forward(model, item.inputs, head).neurons
    down = [layer.mlp.down_proj.weight.detach().double() for layer in layers(model)]
    rows = [z[-1].double() * (direction[:, None] * w).sum(0) for z, w in zip(neurons, down, strict=True)]
    return torch.stack(rows)


def hones_neurons(
    model: PreTrainedModel, items: Sequence[Item], weights: Mapping[Head, float], per_item: bool = False
) -> Tensor:
    """Importance [L, I]: the weighted mean over heads of the rectified drop of the mean contribution."""
    base = [contributions(model, item) for item in items]
    total = torch.zeros_like(base[0])
    for head, weight in weights.items():
        edited = [contributions(model, item, head) for item in items]
        drops = torch.stack([one - other for one, other in zip(base, edited, strict=True)])
        drop = drops.clamp(min=0).mean(0) if per_item else drops.mean(0).clamp(min=0)
        total += weight * drop
    return total / sum(weights.values()) if weights else torch.stack(base).mean(0)


def vseam_heads(model: PreTrainedModel, items: Sequence[Item]) -> dict[str, Any]:
    """Signed, positive and negative head scores [L, H], and how many items are correct (V-SEAM 3)."""
    heads = all_heads(model)
    shape = heads[-1][0] + 1, heads[-1][1] + 1
    sums = {kind: torch.zeros(shape).double() for kind in ("signed", "positive", "negative")}
    correct = 0
    for item in items:
        base = forward(model, item.inputs).logits[-1].float()
        right = int(base.argmax()) in list(item.target)
        correct += right
        p = float(torch.softmax(base, -1)[item.target[0]])
        for head in heads:
            edited = forward(model, item.inputs, head).logits[-1].float()
            drop = p - float(torch.softmax(edited, -1)[item.target[0]])
            sums["signed"][head] += drop
            kind = "positive" if right else "negative"
            sums[kind][head] += max(0.0, drop if right else -drop)
    return {
        "signed": sums["signed"] / len(items),
        "positive": sums["positive"] / max(1, correct),
        "negative": sums["negative"] / max(1, len(items) - correct),
        "correct": correct,
    }
