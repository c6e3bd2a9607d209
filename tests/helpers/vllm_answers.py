"""Answer questions with vLLM, in an interpreter of its own: `python vllm_answers.py REQUEST.json`.

The request names model folders, prompts with one image each, and where to write the token ids of the greedy
answers of each model. This imports nothing of hones-eval, which needs another version of transformers.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": Image.open(image).convert("RGB")}}
        for text, image in asked["questions"]
    ]
    answers = [answered(model, prompts, asked["tokens"]) for model in asked["models"]]
    Path(asked["out"]).write_text(json.dumps(answers))


def answered(model: str, prompts: list[dict[str, Any]], tokens: int) -> list[list[int]]:
    """The token ids of one model's greedy answers."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        limit_mm_per_prompt={"image": 1},
    )
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    answers = [list(found.outputs[0].token_ids) for found in llm.generate(prompts, settings, use_tqdm=False)]
    del llm
    cleanup_dist_env_and_memory()
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]))
