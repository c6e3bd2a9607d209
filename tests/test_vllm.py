"""An exported checkpoint in a serving engine: vLLM answers as transformers does, baseline and steered.

vLLM needs an environment of its own. `HONES_EVAL_VLLM_PYTHON` names its interpreter (docs/serving.md says how
to make it); without it these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from family_parts import chat_template, decoder
from family_tokens import make_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from hones_eval.__main__ import main

PYTHON = os.environ.get("HONES_EVAL_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="set HONES_EVAL_VLLM_PYTHON to the interpreter of an environment with vLLM"
    ),
]
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which imports vLLM once
    "OMP_NUM_THREADS": "1",
}
TOKENS = 12
QUESTIONS = ("What color is it?", "How many cats are there?", "Is the dog left of the chair?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with heads of width 64, a CLIP tower, and the tensor names of published checkpoints."""
    folder = tmp_path_factory.mktemp("vllm") / "llava"
    tokenizer = make_tokenizer({"image_token": "<image>"}, bos_first=True)
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\\n", "USER: ", "ASSISTANT:", " "),
    )
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 256}
    text = decoder(tokenizer, False, **sizes, num_key_value_heads=2)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=128),
        text_config=hf.LlamaConfig(**text),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # answers of freshly made weights hardly depend on the image
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({published(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def published(name: str) -> str:
    """The name that a tensor has in published checkpoints of LLaVA."""
    start = "vision_tower."
    if name.startswith(start) and not name.startswith(start + "vision_model."):
        return f"{start}vision_model.{name.removeprefix(start)}"
    return name


@pytest.fixture(scope="module")
def steered(checkpoint: Path) -> Path:
    """The export of a steering that removes a head, doubles another, and scales some neurons."""
    folder = checkpoint.parent
    sites = ["head 0.1=0", "head 2.0=2", "neuron 1.7=3", "neuron 2.200=-2"]
    chosen = [part for site in sites for part in ("--set", site)]
    by_hand = ["--model_args", f"pretrained={checkpoint}"]
    assert main(["edit-sites", *by_hand, *chosen, "--out", str(folder / "steering")]) == 0
    export = ["--steering", str(folder / "steering"), "--to", "checkpoint", "--out", str(folder / "steered")]
    assert main(["export", *export]) == 0
    names = [set(load_file(path / "model.safetensors")) for path in (checkpoint, folder / "steered")]
    assert names[0] == names[1], "an engine reads tensors by name"
    return folder / "steered"


@pytest.fixture(scope="module")
def questions(checkpoint: Path) -> list[tuple[str, str]]:
    """Prompts, in the model's chat format, each with the path of an image of random colours."""
    drawn, found = np.random.default_rng(0), []
    for number, question in enumerate(QUESTIONS * 2):
        path = checkpoint.parent / f"{number}.png"
        Image.fromarray(drawn.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((56, 56)).save(path)
        found.append((f"USER: <image>\n{question} ASSISTANT:", str(path)))
    return found


@torch.no_grad()
def by_transformers(folder: Path, questions: list[tuple[str, str]]) -> list[list[int]]:
    """Greedy answers of transformers, one question at a time."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    found = []
    for text, image in questions:
        inputs = processor(text=text, images=Image.open(image).convert("RGB"), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def by_vllm(models: list[Path], questions: list[tuple[str, str]], folder: Path) -> list[list[list[int]]]:
    """Greedy answers of each model by vLLM, all questions at once."""
    request, out = folder / "request.json", folder / "answers.json"
    names = [str(model) for model in models]
    request.write_text(
        json.dumps({"models": names, "questions": questions, "tokens": TOKENS, "out": str(out)})
    )
    script = Path(__file__).parent / "helpers" / "vllm_answers.py"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(PYTHON), str(script), str(request)],
        env={**kept, **ON_CPU},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers: list[list[list[int]]] = json.loads(out.read_text())
    return answers


def test_vllm_answers_as_transformers_does(
    checkpoint: Path, steered: Path, questions: list[tuple[str, str]], tmp_path: Path
) -> None:
    """Greedy answers of the original and of the steered export are equal, token by token."""
    models = [checkpoint, steered]
    baseline, under = (by_transformers(model, questions) for model in models)
    assert all(first != second for first, second in zip(baseline, under, strict=True))
    half = len(QUESTIONS)  # the same questions are asked about other images
    assert all(baseline[i] != baseline[i + half] for i in range(half)), "answers depend on the image"
    assert by_vllm(models, questions, tmp_path) == [baseline, under]
