"""Shared by the benchmarks: a small model, its examples, the plain loop of one head at a time, clocks.

The plain loop is written out here, with its own hook; it uses nothing of the package.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hones_eval.core.sites import Head
from hones_eval.lmms.answers.kind import AnswerKind
from hones_eval.lmms.answers.text import TextAnswers

IMAGE, END, WORDS = 5, 2, range(10, 1000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, the element type of the timed model."""
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the model")


@dataclass
class TokenExample:
    """The part of an Example that localization reads."""

    index: int
    task: str
    doc_id: int
    inputs: dict[str, Tensor]
    settings: dict[str, Any]
    target_ids: list[int]
    details: Any = None
    is_distractor: bool = False

    @property
    def where(self) -> str:
        return f"{self.task}, doc_id {self.doc_id}"


class TokenTask:
    """Scores answers by the share of tokens that equal the target's; text is the tokens themselves."""

    higher_is_better = True
    is_mean = True
    kind: AnswerKind = TextAnswers()
    metric = "share"

    def __init__(self, examples: list[TokenExample]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> TokenExample:
        return self.examples[index]

    def with_same_images(self, index: int) -> list[TokenExample]:
        image = self.examples[index].inputs.get("pixel_values")
        return [example for example in self.examples if example.inputs.get("pixel_values") is image]

    def decode(self, index: int, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def score(self, index: int, text: str) -> dict[str, float]:
        target = self.examples[index].target_ids
        given = [int(word) for word in text.split()]
        return {"share": sum(a == b for a, b in zip(given, target, strict=False)) / len(target)}

    def metric_of(self, index: int, result: dict[str, float]) -> float:
        return result["share"]

    def aggregate(self, results: list[dict[str, float]]) -> float:
        return sum(result["share"] for result in results) / len(results)


def small_llava(
    layers: int, heads: int, hidden: int, image_side: int, spread: float, dtype: str = "float32"
) -> Any:
    """A LLaVA with seeded random weights; patches of 14 pixels."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_side,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=(hidden * 43) // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1000,
        initializer_range=spread,
        eos_token_id=END,
        pad_token_id=0,
    )
    patches = (image_side // 14) ** 2
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=patches
    )
    return LlavaForConditionalGeneration(config).eval().to(DTYPES[dtype])


def examples_for(
    model: Any, count: int, new_tokens: int, target_tokens: int, per_image: int = 1
) -> list[TokenExample]:
    """Prompts of one random image and 26 random words; `per_image` in a row share one image."""
    side, patches = model.config.vision_config.image_size, model.config.image_seq_length
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(WORDS.start, WORDS.stop, (1, 26), generator=generator)
        ids = torch.cat([torch.full((1, patches), IMAGE), words], dim=1)
        if index % per_image == 0:
            image = torch.randn(1, 3, side, side, generator=generator).to(model.dtype)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image}
        settings = {"max_new_tokens": new_tokens, "do_sample": False}
        target = torch.randint(WORDS.start, WORDS.stop, (target_tokens,), generator=generator).tolist()
        made.append(TokenExample(index, "random", index, inputs, settings, target))
    return made


def plain_head(model: Any, head: Head, heads: int, run: Callable[[], Any]) -> Any:
    """One run of the model with one head replaced by the mean of the others, by a hook written out here."""

    def replace(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].unflatten(-1, (heads, -1)).clone()
        x[:, :, head.head] = (x.sum(2) - x[:, :, head.head]) / (heads - 1)
        return (x.flatten(2),)

    module = model.get_decoder().layers[head.layer].self_attn.o_proj
    handle = module.register_forward_pre_hook(replace)
    try:
        return run()
    finally:
        handle.remove()


def log_probability(model: Any, example: TokenExample) -> float:
    """The log-probability of the target after the prompt, by one full forward."""
    target = torch.tensor([example.target_ids])
    ids = torch.cat([example.inputs["input_ids"], target], dim=1)
    longer = example.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**longer, use_cache=False).logits[0, -target.shape[1] - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(1, target.T).sum())


def next_probability(model: Any, example: TokenExample) -> float:
    """The probability of the target's first token at the prompt's end, by one full forward."""
    logits = model(**example.inputs, use_cache=False).logits[0, -1].float()
    return float(logits.softmax(-1)[example.target_ids[0]])


def answer(model: Any, example: TokenExample) -> list[int]:
    """The greedy answer, by `generate`."""
    output = model.generate(**example.inputs, **example.settings)
    tokens: list[int] = output[0, example.inputs["input_ids"].shape[1] :].tolist()
    return tokens


class Clock:
    """Adds up the CPU time of this thread, which other work on the machine disturbs less than wall time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start


@dataclass
class Operations:
    """Seconds of a call under the profiler, and those of them that tensor operations took, by name.

    `called` is the share of operations that Python called; the others were called within operations.
    """

    seconds: float
    by_name: dict[str, float]
    called: float

    @property
    def outside(self) -> float:
        """The share outside of operations: Python, hooks, and the profiler's own time between operations."""
        return 1 - sum(self.by_name.values()) / self.seconds

    def outside_without_profiler(self, seconds: float) -> float:
        """An estimate of that share, given the seconds of the same call without the profiler.

        The profiler delays the call before and after every operation, by about as much for each: so the share
        of the delay that counts as outside is that of the operations that Python called.
        """
        delay = self.called * (self.seconds - seconds)
        return max(0.0, self.outside * self.seconds - delay) / seconds


def operations(run: Callable[[], Any]) -> Operations:
    """Profile a call on the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as seen, record_function("all"):
        run()
    events = {event.key: event for event in seen.key_averages()}
    whole = events.pop("all").cpu_time_total
    by_name = {key: 1e-6 * event.self_cpu_time_total for key, event in events.items()}
    parents = [event.cpu_parent.name for event in seen.events() if event.cpu_parent is not None]
    return Operations(1e-6 * whole, by_name, parents.count("all") / len(parents))


def multiply_adds(run: Callable[[], Any]) -> float:
    """The multiply-adds of a call's matrix products and attention."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops() / 2
