"""Tiny random models that read text alone: a dense base model, and a mixture of experts for chats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Value
from family_tokens import make_tokenizer
from lmms_runs import parquet
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

NAMES = ("llama", "qwen3_moe")
EXPERTS, TOP, WIDTH = 8, 2, 24
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINGS = ["cat", "dog", "bird", "horse", "car", "bus", "boat", "tree", "house", "man", "ball", "cup"]
QUESTION = "What color is the {}?"
COLORS = ["red", "green", "blue"]
YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


def build(name: str, vocabulary: int) -> PreTrainedModel:
    """A tiny random model of 4 layers, 4 heads, and 96 neurons or 8 experts of 24 neurons each."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    if name == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOP, "moe_intermediate_size": WIDTH}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, head_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_checkpoint(name: str, folder: Path) -> Path:
    """Save a tiny model with its tokenizer; the dense one is a base model without a chat template."""
    tokenizer = make_tokenizer({})
    if name != "llama":
        tokenizer.chat_template = TEMPLATE
    build(name, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(checkpoint: Path) -> tuple[PreTrainedModel, Any]:
    """The model and its tokenizer, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return model, AutoTokenizer.from_pretrained(checkpoint)


def prompt_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """The prompt of one question [1, tokens], by transformers alone."""
    if tokenizer.chat_template is None:
        return tokenizer(question, return_tensors="pt").input_ids
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: Any, question: str) -> str:
    """The greedy answer of three tokens, by transformers alone."""
    ids = prompt_ids(tokenizer, question)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()


def write_tasks(folder: Path, checkpoint: Path, count: int = 12) -> list[str]:
    """Write ``text_own``, whose gold answers mostly are the model's own, and ``text_choice``.

    Returns: the gold answers of ``text_own``.
    """
    folder.mkdir(parents=True)
    model, tokenizer = load(checkpoint)
    questions = [QUESTION.format(thing) for thing in THINGS[:count]]
    golds = ["green plate" if i % 4 == 3 else answer(model, tokenizer, q) for i, q in enumerate(questions)]
    _write(folder, "text_own", questions, golds, "generate_until", "exact_match")
    labels = [str(i % 3) for i in range(count)]
    _write(folder, "text_choice", questions, labels, "multiple_choice", "acc")
    return golds


def _write(
    folder: Path, name: str, questions: Sequence[str], golds: Sequence[str], kind: str, metric: str
) -> None:
    text = Value("string")
    rows: list[dict[str, Any]] = [
        {"question": question, "answer": gold} for question, gold in zip(questions, golds, strict=True)
    ]
    more = "generation_kwargs:\n  max_new_tokens: 3"
    if kind == "multiple_choice":
        rows = [row | {"answer": int(row["answer"])} for row in rows]
        more = f"doc_to_choice: {COLORS}"
    features = {"question": text, "answer": Value("int64") if kind == "multiple_choice" else text}
    data = folder / f"{name}.parquet"
    data.write_bytes(parquet(rows, **features))
    (folder / f"{name}.yaml").write_text(
        YAML.format(name=name, data=data, kind=kind, more=more, metric=metric)
    )
