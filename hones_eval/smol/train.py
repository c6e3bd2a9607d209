"""Train what joins the pretrained parts: `python -m hones_eval.smol.train --out DIR`.

The vision tower stays frozen. First the projector learns to turn patches into words (`words.py`). Then it is
trained further on questions, together with low-rank updates of the language model's matrices (`--rank 0` for
none). Images, questions and answers are those of the drawn scenes' training split (`hones_eval.toy`), whose
words never appear in another split. Several questions share an image, as `hones_eval.toy.packing` explains.
In the first part every image is described whole, cell by cell and shape by shape: with short questions alone
the model does not learn to look at the image. A killed run goes on from its last checkpoint.
"""

import csv
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from hones_eval.core.artifact import write_json
from hones_eval.smol.assemble import IMAGE_TOKENS, assemble, probe
from hones_eval.smol.inputs import Packer, Scaling, features, measure_scaling
from hones_eval.smol.parts import LANGUAGE, VISION, fetch
from hones_eval.smol.words import teach_words
from hones_eval.toy.packing import IGNORED, Batch, answer_loss, verdicts
from hones_eval.toy.scenes import scene

# How often each topic is asked for.
TOPICS = {
    "describe": 0.5, "inventory": 0.5, "caption": 1.0, "ocr": 1.5, "shape_at": 1.0, "color": 1.5,
    "texture": 1.0, "size": 0.5, "exists": 1.5, "is_color": 1.5, "is_texture": 0.7, "is_side": 2.0,
    "what_side": 1.0, "retrieval": 1.0, "grounding": 0.5,
}  # fmt: skip
# The same in the last part of the training.
JUDGING = {
    "describe": 0.2, "caption": 1.0, "ocr": 2.0, "shape_at": 0.7, "color": 0.7, "texture": 0.5, "size": 0.3,
    "exists": 2.5, "is_color": 2.5, "is_texture": 1.2, "is_side": 3.0, "what_side": 1.0, "retrieval": 1.5,
    "grounding": 0.3,
}  # fmt: skip
WORD_SCENES = 1_000_000  # of the training split; later steps use those before
QUESTIONS = 10  # requested per image; those that fit into the row's width are taken


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults made the committed weights."""

    out: Path = Path("runs/smol")
    seed: int = 0
    word_steps: int = 300  # of the projector alone, see `words.py`
    word_images: int = 16  # per step
    word_rate: float = 2e-3
    steps: int = 900
    looking_steps: int = 250  # the first ones, in which every image is described
    judging_from: int = 375  # the step from which yes-or-no questions are asked for more often
    looking_width: int = 234  # tokens per image, its questions included
    width: int = 352  # after that
    tokens: int = 704  # per step, over all images
    rank: int = 8  # of the language model's updates; 0 for none
    rate: float = 1e-3  # of the updates
    projector_rate: float = 2e-4
    warmup: int = 50
    measure_every: int = 150
    measured_images: int = 48  # of the development split
    save_every: int = 50


def answer_logits(
    model: LlavaForConditionalGeneration, batch: Batch, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """Logits `[M, V]` in float32 at the `M` labelled positions, and the mask `[B, T]` of these positions.

    Beside the frozen bfloat16 parts, the projector works in float32.
    """
    inner = model.model
    dtype = inner.language_model.embed_tokens.weight.dtype
    standardized = (features(model, batch.pixels) - scaling.mean) / scaling.deviation
    projected = inner.multi_modal_projector(standardized).to(dtype)
    embedded = inner.language_model.embed_tokens(batch.ids)
    is_image = batch.ids == model.config.image_token_index
    embedded = embedded.masked_scatter(is_image[:, :, None], projected)
    mask = torch.zeros(batch.mask.shape, dtype=dtype).masked_fill(~batch.mask, torch.finfo(dtype).min)
    states = inner.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    places = batch.labels != IGNORED
    return model.lm_head(states[places]).float(), places


def train(settings: Settings) -> Path:
    """Train, log and save. Returns: the file with the trained weights."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model, processor = assemble(fetch(VISION), fetch(LANGUAGE), None)
    parameters = prepare(model, settings.rank)
    packer = Packer(processor, IMAGE_TOKENS)
    scaling = measure_scaling(model, packer)
    rates = {False: settings.rate, True: settings.projector_rate}
    projector = set(model.model.multi_modal_projector.parameters())
    groups = [
        {"params": [p for p in parameters if (p in projector) == own], "lr": rate}
        for own, rate in rates.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    settings.out.mkdir(parents=True, exist_ok=True)
    state, log = settings.out / "state.pt", settings.out / "training_log.csv"
    step, spent = _restore(state, model, optimizer)
    if not state.is_file():
        left = teach_words(
            model,
            packer,
            scaling,
            steps=settings.word_steps,
            images=settings.word_images,
            rate=settings.word_rate,
            first=WORD_SCENES,
        )
        print(f"variance of the words' embeddings that is left: {sum(left[-20:]) / 20:.3f}", flush=True)
    started, losses = time.monotonic() - spent, list[float]()
    while step < settings.steps:
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * _schedule(step, settings)
        batch = _batch(packer, settings, step)
        loss = answer_loss(*answer_logits(model, batch, scaling), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        last = step == settings.steps
        if step % settings.save_every == 0 or last:
            is_measured = step % settings.measure_every == 0 or last
            measured = accuracy(model, packer, scaling, settings) if is_measured else {}
            _write_log(log, step, time.monotonic() - started, sum(losses) / len(losses), measured)
            losses.clear()
            save_file(trained_weights(model, scaling), settings.out / "trained.safetensors")
            _save(state, model, optimizer, step, time.monotonic() - started)
    return write_probe(settings.out)


def write_probe(out: Path) -> Path:
    """Write `probe.json`: logits of the model that `trained.safetensors` in the same folder gives.

    Both files belong into this package. Returns: the file with the trained weights.
    """
    trained = out / "trained.safetensors"
    model, processor = assemble(fetch(VISION), fetch(LANGUAGE), load_file(trained))
    prompt = "<|im_start|>user\n<image>\nWhat color is the circle?<|im_end|>\n<|im_start|>assistant\n"
    tokens = ["Yes", "No", "red", "green", "blue", "circle", "square", "left"]
    logits = probe(model, processor, prompt, tokens)
    stored = {"prompt": prompt, "tokens": tokens, "logits": logits, "transformers": transformers.__version__}
    write_json(out / "probe.json", stored)
    return trained


def prepare(model: LlavaForConditionalGeneration, rank: int) -> list[nn.Parameter]:
    """Freeze the model in bfloat16, except a float32 projector and low-rank updates.

    Returns: the parameters that are trained.
    """
    model.requires_grad_(False)
    nn.Module.to(model, torch.bfloat16)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if rank:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0)
        inject_adapter_in_model(config, model.model.language_model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_weights(model: LlavaForConditionalGeneration, scaling: Scaling) -> dict[str, Tensor]:
    """The projector and the low-rank updates, by the names that `assemble` reads; matrices in bfloat16."""
    state = model.model.multi_modal_projector.state_dict()
    projector = {name: tensor.detach().clone() for name, tensor in state.items()}
    first = (projector["linear_1.weight"] / scaling.deviation).to(torch.bfloat16)
    # The bias makes up for the mean as the rounded matrix sees it.
    projector["linear_1.bias"] -= first.float() @ scaling.mean
    projector["linear_1.weight"] = first
    projector["linear_2.weight"] = projector["linear_2.weight"].to(torch.bfloat16)
    found = {f"projector.{name}": tensor.contiguous() for name, tensor in projector.items()}
    for name, module in model.model.language_model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            for part, layer in (("a", module.lora_A["default"]), ("b", module.lora_B["default"])):
                found[f"update.{name}.{part}"] = layer.weight.detach().to(torch.bfloat16).contiguous()
    return found


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, packer: Packer, scaling: Scaling, settings: Settings
) -> dict[str, float]:
    """Share of development questions of each topic that greedy decoding would answer word for word."""
    right: dict[str, list[bool]] = {topic: [] for topic in TOPICS}
    rng = random.Random("development")
    for index in range(settings.measured_images):
        wishes = [rng.sample(list(TOPICS), len(TOPICS))]
        batch = packer.pack([scene("development", index)], wishes, rng, settings.width)
        for topic, verdict in verdicts(*answer_logits(model, batch, scaling), batch):
            right[topic].append(verdict)
    return {topic: sum(found) / len(found) for topic, found in right.items() if found}


def _batch(packer: Packer, settings: Settings, step: int) -> Batch:
    """The batch of a step, the same whenever it is asked for."""
    rng = random.Random(f"smol/{settings.seed}/{step}")
    looking = step < settings.looking_steps
    width = settings.looking_width if looking else settings.width
    images = settings.tokens // width
    whole = ["describe", "inventory"] if looking else []
    mixture = JUDGING if step >= settings.judging_from else TOPICS
    wishes = [whole + rng.choices(list(mixture), list(mixture.values()), k=QUESTIONS) for _ in range(images)]
    first = step * (settings.tokens // settings.looking_width)  # no image is used twice
    return packer.pack([scene("train", first + i) for i in range(images)], wishes, rng, width)


def _schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, a constant rate, then linear down to a fiftieth over the last two fifths."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    left = (settings.steps - step) / (0.4 * settings.steps)
    return min(1.0, max(left, 0.02))


def _restore(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not state.is_file():
        return 0, 0.0
    kept: dict[str, Any] = torch.load(state, weights_only=True)
    model.load_state_dict(kept["weights"], strict=False)
    optimizer.load_state_dict(kept["optimizer"])
    return int(kept["step"]), float(kept["seconds"])


def _save(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    weights = {
        name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    kept = {"weights": weights, "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(kept, state.with_suffix(".part"))
    os.replace(state.with_suffix(".part"), state)


def _write_log(path: Path, step: int, seconds: float, loss: float, measured: dict[str, float]) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["step", "seconds", "loss", *TOPICS])
        found = [f"{measured[topic]:.3f}" if topic in measured else "" for topic in TOPICS]
        writer.writerow([step, f"{seconds:.0f}", f"{loss:.4f}", *found])
    shown = {"step": step, "seconds": round(seconds), "loss": round(loss, 4), **measured}
    print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    from jsonargparse import CLI

    train(CLI(Settings, as_positional=False))
