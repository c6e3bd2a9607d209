"""`hones-eval export`."""

from pathlib import Path
from typing import TYPE_CHECKING

from hones_eval.choices import Export
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(
    steering: str,
    to: Export,
    out: Path,
    pretrained: str | None = None,
    strength: float = 1.0,
) -> Answer:
    """Write a steering as steered weights or as a PEFT adapter; neither needs this package to run.

    Args:
        steering: a folder that scale wrote, or a Hugging Face hub id.
        to: the form; checkpoint is weights with the scales folded in and the processor, ia3 a PEFT adapter.
        out: the folder to write to.
        pretrained: the base model's folder or hub id; by default the one that the steering names.
        strength: a scale s becomes 1 + strength * (s - 1).

    Example:
        hones-eval export --steering runs/vqa/steering --to checkpoint --out runs/vqa/steered-model
    """
    from hones_eval.core.export import export_checkpoint, export_ia3
    from hones_eval.core.steering import Steering

    loaded = Steering.load(steering).at_strength(strength)
    if loaded.is_noop:
        raise HonesError(f"{steering} at strength {strength:g}: every scale is 1, there is nothing to export")
    base = pretrained or loaded.provenance.base_model
    if out.resolve() == Path(base).resolve():
        raise HonesError(f"--out {out} is the base model's own folder: give another one")
    model = _model(base)
    if to == "ia3":
        export_ia3(model, loaded, out)
    else:
        from transformers import AutoProcessor

        export_checkpoint(model, loaded, out, AutoProcessor.from_pretrained(base).save_pretrained)
    lines = [f"wrote {out}: {base} steered, as {to}"]
    return Answer(lines, {"out": str(out), "base_model": base, "to": to, "strength": strength})


def _model(base: str) -> "PreTrainedModel":
    from transformers import AutoModelForImageTextToText, PreTrainedModel

    try:
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HonesError(
            f"no vision-language model at {base!r}: {reason}; name it with --pretrained"
        ) from None
    model.eval()
    return model
