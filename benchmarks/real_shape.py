"""Discovery at the shapes of real models, on a GPU: LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights.

Built from the models' own sizes, so that nothing is downloaded; speed does not depend on the weights' values,
except for how many answers an edit changes (random weights change more than trained ones). For each model:
examples x heads per second, the share of this device's matrix-multiply rate that the passes' own arithmetic
reaches, and the hours that 5,000 examples would take. Usage:

    python benchmarks/real_shape.py [--examples 4] [--models llava_1_5_7b,qwen2_5_vl_7b]
    python benchmarks/real_shape.py --trial    # two narrow layers: does the script run, on a CPU too
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_loop import DTYPES, TokenExample, TokenTask
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
)

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head
from hones_eval.engine.replay import Replayer
from hones_eval.methods.hones import NeuronAttribution
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.vseam import HeadContribution
from hones_eval.runs.measure import Measure

PROMPT, ANSWER, TARGET, EXAMPLES = 40, 24, 4, 5000
SIDE = 24  # image tokens along one side: 576 in all
NARROW = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
NARROW_SIGHT = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_attention_heads": 2}


def llava_1_5_7b(trial: bool) -> LlavaConfig:
    """As published: 32 layers, 32 heads, hidden 4096, 576 image tokens."""
    text = {"vocab_size": 32064} | (NARROW if trial else {})  # the rest is LlamaConfig's default
    sight = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**(sight | (NARROW_SIGHT if trial else {}))),
        text_config=LlamaConfig(**text),
        image_token_id=32000,
        image_seq_length=SIDE * SIDE,
    )


def qwen2_5_vl_7b(trial: bool) -> Qwen2_5_VLConfig:
    """As published: 28 layers, 28 query and 4 key-value heads, hidden 3584; an image of 672 x 672 pixels."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    sight = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    if trial:
        text |= NARROW | {"num_key_value_heads": 1}
        sight |= NARROW_SIGHT | {"out_hidden_size": NARROW["hidden_size"]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=sight, tie_word_embeddings=False)


CONFIGS: dict[str, Callable[[bool], Any]] = {
    "llava_1_5_7b": llava_1_5_7b,
    "qwen2_5_vl_7b": qwen2_5_vl_7b,
}


def examples_for(config: Any, count: int, device: torch.device, dtype: torch.dtype) -> list[TokenExample]:
    """Prompts of one image of 576 tokens and 40 random words; the targets are random too."""
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(1000, 30000, (1, PROMPT + TARGET), generator=generator)
        image = torch.full((1, SIDE * SIDE), config.image_token_id)
        parts = [image, words[:, :PROMPT]]
        if isinstance(config, LlavaConfig):
            image_inputs = {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator).to(dtype)}
        else:
            patches = torch.randn(4 * SIDE * SIDE, 1176, generator=generator).to(dtype)
            image_inputs = {
                "pixel_values": patches,
                "image_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]]),
            }
            parts = [torch.tensor([[config.vision_start_token_id]]), image, words[:, :PROMPT]]
        ids = torch.cat(parts, dim=1)
        if not isinstance(config, LlavaConfig):
            image_inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image_inputs}
        settings = {"max_new_tokens": ANSWER, "do_sample": False}
        on_device = {name: value.to(device) for name, value in inputs.items()}
        target = words[0, PROMPT:].tolist()
        made.append(TokenExample(index, "random", index, on_device, settings, target))
    return made


def timed(measure: Measure, examples: list[TokenExample]) -> tuple[float, float]:
    """Seconds an example after a warm-up, and its arithmetic in floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        measure.measure(examples[0])  # type: ignore[arg-type]
    synchronize()
    start = time.perf_counter()
    for example in examples:
        measure.measure(example)  # type: ignore[arg-type]
    synchronize()
    return (time.perf_counter() - start) / len(examples), float(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product on this device."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def synchronize() -> None:
    """Wait for the device, where work is queued on one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def run(name: str, count: int, trial: bool, heads: int, given_dtype: str | None) -> None:
    """Print a row for each pass over one model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[given_dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    config = CONFIGS[name](trial)
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    examples = examples_for(config, count, device, dtype)
    anatomy = Anatomy.of(model)
    replayer = Replayer(anatomy)
    rate = matmul_rate(device, dtype)
    shape = anatomy.shape
    spread = [Head(layer, layer % shape.heads) for layer in range(shape.layers)][:heads]
    task: Any = TokenTask(examples)
    localization = HeadLocalization(replayer, task)
    passes: dict[str, tuple[Measure, int]] = {
        "V-SEAM heads (next token)": (HeadContribution(replayer, task), shape.layers * shape.heads),
        "HONES heads (generation)": (localization, shape.layers * shape.heads),
        f"HONES neurons ({len(spread)} heads)": (NeuronAttribution(replayer, spread), len(spread)),
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"\n{name}, {shape.layers} layers, {dtype}, {where}, {rate / 1e12:.1f} TFLOP/s in one large product"
    )
    print("| pass | seconds an example | heads x examples a second | share of the rate | hours for 5,000 |")
    print("|---|---:|---:|---:|---:|")
    for title, (measure, edits) in passes.items():
        seconds, operations = timed(measure, examples)
        share = operations / seconds / rate
        hours = seconds * EXAMPLES / 3600
        print(f"| {title} | {seconds:.2f} | {edits / seconds:.0f} | {share:.0%} | {hours:.1f} |", flush=True)
    print(f"replay: {replayer.inexact or 'exact within the rounding of ' + str(dtype)}")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--trial", action="store_true", help="narrow models of two layers")
    parser.add_argument("--heads", type=int, default=30, help="that neurons are conditioned on")
    parser.add_argument("--dtype", choices=list(DTYPES), help="by default bfloat16 on a GPU, else float32")
    given = parser.parse_args()
    for model_name in given.models.split(","):
        run(model_name, given.examples, given.trial, given.heads, given.dtype)
