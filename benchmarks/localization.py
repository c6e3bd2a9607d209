"""Head localization beside a plain loop: one head, one example, one full forward or one full decoding.

Both run in this process, on one thread, over the same examples of the same model; printed are the ratio of
wall times and the largest difference of scores. Usage:

    python benchmarks/localization.py [--examples 3] [--what log_probability|generation|both]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hones_eval.anatomy import Anatomy
from hones_eval.margin import Margin
from hones_eval.measure import Totals
from hones_eval.methods.hones import HeadLocalization
from hones_eval.replay import Replayer
from hones_eval.sites import Head

IMAGE, END, WORDS = 5, 2, range(10, 1000)


@dataclass
class TokenExample:
    """The part of an Example that localization reads."""

    index: int
    task: str
    doc_id: int
    inputs: dict[str, Tensor]
    settings: dict[str, Any]
    target_ids: list[int]
    margin: Margin | None = None
    is_distractor: bool = False


class TokenTask:
    """Scores answers by the share of tokens that equal the target's; text is the tokens themselves."""

    higher_is_better = True
    is_mean = True
    metric = "share"

    def __init__(self, examples: list[TokenExample]) -> None:
        self.examples = examples

    def decode(self, index: int, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def score(self, index: int, text: str) -> dict[str, float]:
        target = self.examples[index].target_ids
        given = [int(word) for word in text.split()]
        return {"share": sum(a == b for a, b in zip(given, target, strict=False)) / len(target)}

    def aggregate(self, results: list[dict[str, float]]) -> float:
        return sum(result["share"] for result in results) / len(results)


def small_llava(layers: int, heads: int, hidden: int, image_side: int, spread: float) -> Any:
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
    return LlavaForConditionalGeneration(config).eval()


def examples_for(model: Any, count: int, new_tokens: int, target_tokens: int) -> list[TokenExample]:
    """Prompts of one random picture and 26 random words."""
    side, patches = model.config.vision_config.image_size, model.config.image_seq_length
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(WORDS.start, WORDS.stop, (1, 26), generator=generator)
        ids = torch.cat([torch.full((1, patches), IMAGE), words], dim=1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        }
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
    """Of the target behind the prompt, by one full forward."""
    target = torch.tensor([example.target_ids])
    ids = torch.cat([example.inputs["input_ids"], target], dim=1)
    longer = example.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**longer, use_cache=False).logits[0, -target.shape[1] - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(1, target.T).sum())


def answer(model: Any, example: TokenExample) -> list[int]:
    """The greedy answer, by `generate`."""
    output = model.generate(**example.inputs, **example.settings)
    tokens: list[int] = output[0, example.inputs["input_ids"].shape[1] :].tolist()
    return tokens


@torch.no_grad()
def by_log_probability(examples_count: int) -> None:
    """8 layers, 8 heads, hidden 256, 144 image tokens, targets of 3 tokens."""
    model = small_llava(layers=8, heads=8, hidden=256, image_side=168, spread=0.05)
    examples = examples_for(model, examples_count, new_tokens=1, target_tokens=3)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), TokenTask(examples))  # type: ignore[arg-type]
    heads = localization.heads

    def fast() -> Tensor:
        drops = torch.stack([localization.log_probability_drop(e)[0] for e in examples])  # type: ignore[arg-type]
        return drops.sum(0).reshape(8, 8)

    def plain() -> Tensor:
        drops = torch.zeros(8, 8, dtype=torch.float64)
        for example in examples:
            base = log_probability(model, example)
            for head in heads:
                drops[head] += base - plain_head(
                    model, head, 8, lambda example=example: log_probability(model, example)
                )
        return drops

    compare("by log-probability", fast, plain, len(examples))


@torch.no_grad()
def by_generation(examples_count: int) -> None:
    """6 layers, 8 heads, hidden 128, 16 image tokens, answers up to 14 tokens."""
    model = small_llava(layers=6, heads=8, hidden=128, image_side=56, spread=0.02)
    examples = examples_for(model, examples_count, new_tokens=14, target_tokens=1)
    for example in examples:
        example.target_ids = answer(model, example)[:-1]  # so that edits lower the score
    task = TokenTask(examples)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), task)  # type: ignore[arg-type]
    differing = 0.0

    def fast() -> Tensor:
        nonlocal differing
        measured = [localization.measure(e) for e in examples]  # type: ignore[arg-type]
        differing = sum(float(m.sums["differing_answers"]) for m in measured) / (48 * len(examples))
        return localization.scores(
            Totals({name: sum(m.sums[name] for m in measured) for name in measured[0].sums}, {})
        )

    def plain() -> Tensor:
        scores = torch.zeros(6, 8)
        base = [task.score(e.index, task.decode(e.index, answer(model, e))) for e in examples]
        for head in localization.heads:
            edited = [
                plain_head(model, head, 8, lambda example=example: answer(model, example))
                for example in examples
            ]
            results = [task.score(i, task.decode(i, tokens)) for i, tokens in enumerate(edited)]
            scores[head] = task.aggregate(base) - task.aggregate(results)
        return scores

    compare("by generation", fast, plain, len(examples))
    print(f"  answers that differ from the unedited one: {differing:.1%}")


def compare(name: str, fast: Callable[[], Tensor], plain: Callable[[], Tensor], count: int) -> None:
    """Warm both up by running the fast one once; then time one run of each."""
    fast()
    start = time.perf_counter()
    found = fast()
    middle = time.perf_counter()
    expected = plain()
    end = time.perf_counter()
    worst = float((found - expected).abs().max())
    print(
        f"{name}: {count} examples, plain loop {end - middle:.2f} s, ours {middle - start:.2f} s, "
        f"ratio {(end - middle) / (middle - start):.2f}; largest difference of scores {worst:.1e} "
        f"(largest score {float(expected.abs().max()):.2g})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--what", choices=["log_probability", "generation", "both"], default="both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what != "generation":
        by_log_probability(arguments.examples)
    if arguments.what != "log_probability":
        by_generation(arguments.examples)
