"""A tiny Qwen3-VL-MoE with a real processor: 4 experts of 24 neurons, of which each token is routed to 2."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from family_doors import Question
from family_qwen import qwen3_vl

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ExampleSet, Provenance
from hones_eval.core.steering import Steering

ROUTING = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def save_checkpoint(folder: Path) -> Path:
    """Save a random model of the sizes of the family ``qwen3_vl``, with its processor."""
    dense = qwen3_vl(False)
    content = dense.config.to_dict()
    config = hf.Qwen3VLMoeConfig(
        text_config={
            **{name: value for name, value in content["text_config"].items() if name != "model_type"},
            **ROUTING,
        },
        vision_config={
            name: value for name, value in content["vision_config"].items() if name != "model_type"
        },
        **{name: value for name, value in content.items() if name.endswith("token_id") and value is not None},
    )
    torch.manual_seed(0)
    model = hf.Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    dense.processor.save_pretrained(folder)
    return folder


def chat(question: Question) -> list[dict[str, Any]]:
    """A question with its images as one turn of a chat."""
    shown = [{"type": "image", "image": picture} for picture in question.pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question.text}]}]


def steering(anatomy: Anatomy) -> Steering:
    """Random scales of all heads and neurons, from 0.5 to 1.5."""
    shape, generator = anatomy.shape, torch.Generator().manual_seed(6)
    source = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    heads = torch.rand(shape.layers, shape.heads, generator=generator) + 0.5
    return Steering(heads, torch.rand(shape.layers, shape.neurons, generator=generator) + 0.5, source)
