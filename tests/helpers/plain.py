"""A slow reference of both methods: one head, one item, one full forward or one full decoding at a time.

Written from the formulas alone, with loops and with hooks of its own, so that agreement means something.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LANGUAGE_MODELS = {
    "Idefics2ForConditionalGeneration": "model.text_model",
    "Idefics3ForConditionalGeneration": "model.text_model",
    "SmolVLMForConditionalGeneration": "model.text_model",
    "InstructBlipForConditionalGeneration": "language_model.model",
}


class Edit(NamedTuple):
    """A head replaced by the mean of the others, or a head or a neuron set to zero, at every position."""

    layer: int
    site: int
    kind: Literal["mean", "zero head", "zero neuron"] = "mean"


class Pass(NamedTuple):
    """One full forward: logits [tokens, vocabulary] and per layer the FFN activations [tokens, I]."""

    logits: Tensor
    neurons: list[Tensor]


class Item(NamedTuple):
    """One question: what `forward` takes, the other arguments of `generate`, the target's tokens.

    `rarity` weighs the target's tokens; by default each weighs 1.
    """

    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    target: Sequence[int]
    rarity: Mapping[int, float] | None = None


def language_model(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(LANGUAGE_MODELS.get(type(model).__name__, "model.language_model"))


def layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(language_model(model).layers)


def head_count(model: PreTrainedModel) -> int:
    return language_model(model).config.num_attention_heads


def all_heads(model: PreTrainedModel) -> list[Edit]:
    """Every head replaced by the mean of the others."""
    return [Edit(layer, head) for layer in range(len(layers(model))) for head in range(head_count(model))]


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
def edited(model: PreTrainedModel, edit: Edit | None) -> Iterator[None]:
    if edit is None:
        yield
        return
    layer, heads = layers(model)[edit.layer], head_count(model)

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        if edit.kind == "mean":
            return (replaced_by_mean(args[0], edit.site, heads),)
        width = args[0].shape[-1] // heads if edit.kind == "zero head" else 1
        kept = torch.ones(args[0].shape[-1], dtype=args[0].dtype)
        kept[edit.site * width : (edit.site + 1) * width] = 0
        return (args[0] * kept,)

    linear = layer.mlp.down_proj if edit.kind == "zero neuron" else layer.self_attn.o_proj
    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def forward(model: PreTrainedModel, inputs: Mapping[str, Any], edit: Edit | None = None) -> Pass:
    """One item through the whole model, with one edit or none."""
    kept: list[Tensor] = []
    handles = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        kept.append(args[0][0].clone())

    with edited(model, edit):  # its hook comes first, so that a neuron is recorded as it was edited
        try:
            handles += [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in layers(model)]
            logits = model(**inputs).logits[0]
        finally:
            for handle in handles:
                handle.remove()
    return Pass(logits, kept)


@torch.no_grad()
def answer(model: PreTrainedModel, item: Item, edit: Edit | None = None) -> list[int]:
    """New tokens of `generate`, the end token included."""
    with edited(model, edit):
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


def log_probability(model: PreTrainedModel, item: Item, edit: Edit | None = None) -> float:
    """Natural logarithm of the probability of the target's tokens behind the prompt."""
    prompt = item.inputs["input_ids"].shape[1]
    logits = forward(model, with_answer(model, item.inputs, item.target), edit).logits
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
    metric_drop, log_drop = (torch.zeros(len(layers(model)), head_count(model)).double() for _ in range(2))
    for edit in all_heads(model):
        place = edit.layer, edit.site
        metric_drop[place] = base - metric([answer(model, item, edit) for item in items])
        drops = [one - log_probability(model, item, edit) for one, item in zip(sure, items, strict=True)]
        log_drop[place] = sum(drops) / len(drops)
    return metric_drop, log_drop


def contributions(model: PreTrainedModel, item: Item, edit: Edit | None = None) -> Tensor:
    """`c = z * <W_down[:, i], u_y>` [L, I] at the last prompt token (HONES 2)."""
    unembedding = model.get_output_embeddings().weight.detach().double()
    direction = torch.zeros(unembedding.shape[1]).double()
    for token in item.target:
        direction += unembedding[token] * (1.0 if item.rarity is None else item.rarity[token])
    direction /= torch.linalg.vector_norm(direction)
    neurons = forward(model, item.inputs, edit).neurons
    down = [layer.mlp.down_proj.weight.detach().double() for layer in layers(model)]
    rows = [z[-1].double() * (direction[:, None] * w).sum(0) for z, w in zip(neurons, down, strict=True)]
    return torch.stack(rows)


def hones_neurons(
    model: PreTrainedModel, items: Sequence[Item], weights: Mapping[Edit, float], per_item: bool = False
) -> Tensor:
    """Importance [L, I]: the weighted mean over heads of the rectified drop of the mean contribution."""
    base = [contributions(model, item) for item in items]
    total = torch.zeros_like(base[0])
    for edit, weight in weights.items():
        others = [contributions(model, item, edit) for item in items]
        drops = torch.stack([one - other for one, other in zip(base, others, strict=True)])
        drop = drops.clamp(min=0).mean(0) if per_item else drops.mean(0).clamp(min=0)
        total += weight * drop
    return total / sum(weights.values()) if weights else torch.stack(base).mean(0)


def rarities(documents: Sequence[Sequence[int]]) -> dict[int, float]:
    """Smoothed inverse document frequency `ln((n + 1) / (df + 1)) + 1` of every token that occurs."""
    tokens = {token for document in documents for token in document}
    frequency = {token: sum(token in document for document in documents) for token in tokens}
    return {token: math.log((len(documents) + 1) / (df + 1)) + 1 for token, df in frequency.items()}


def vseam_heads(model: PreTrainedModel, items: Sequence[Item]) -> dict[str, Any]:
    """Signed, positive and negative head scores [L, H], and how many items are correct (V-SEAM 3)."""
    shape = len(layers(model)), head_count(model)
    sums = {kind: torch.zeros(shape).double() for kind in ("signed", "positive", "negative")}
    correct = 0
    for item in items:
        base = forward(model, item.inputs).logits[-1].float()
        right = int(base.argmax()) in list(item.target)
        correct += right
        p = float(torch.softmax(base, -1)[item.target[0]])
        for edit in all_heads(model):
            logits = forward(model, item.inputs, edit).logits[-1].float()
            drop = p - float(torch.softmax(logits, -1)[item.target[0]])
            sums["signed"][edit.layer, edit.site] += drop
            kind = "positive" if right else "negative"
            sums[kind][edit.layer, edit.site] += max(0.0, drop if right else -drop)
    return {
        "signed": sums["signed"] / len(items),
        "positive": sums["positive"] / max(1, correct),
        "negative": sums["negative"] / max(1, len(items) - correct),
        "correct": correct,
    }
