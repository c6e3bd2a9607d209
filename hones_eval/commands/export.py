"""`hones-eval export`."""

from pathlib import Path
from typing import Literal

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from hones_eval.commands.shared import say
from hones_eval.core.export import export_checkpoint, export_ia3, write_folder
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError


def export(
    steering: str,
    to: Literal["checkpoint", "ia3"],
    out: Path,
    pretrained: str | None = None,
    strength: float = 1.0,
) -> None:
    """Write a steering as steered weights, or as a stock PEFT adapter; neither needs this package to run.

    Args:
        steering: a folder that scale wrote, or a Hugging Face hub id.
        to: checkpoint (weights with the scales folded in, and the processor) or ia3 (a PEFT adapter).
        out: the folder to write to.
        pretrained: the base model's folder or hub id; by default the one that the steering names.
        strength: a scale s becomes 1 + strength * (s - 1).
    """
    loaded = Steering.load(steering).at_strength(strength)
    if loaded.is_noop:
        raise HonesError(f"{steering} at strength {strength:g}: every scale is 1, there is nothing to export")
    base = pretrained or loaded.provenance.base_model
    if out.resolve() == Path(base).resolve():
        raise HonesError(f"--out {out} is the base model itself, which would be lost: give another folder")
    model = _model(base)
    if to == "ia3":
        export_ia3(model, loaded, out)
    else:
        export_checkpoint(model, loaded, out)
        write_folder(out, AutoProcessor.from_pretrained(base).save_pretrained)
    say(f"wrote {out}: {base} steered, as {to}")


def _model(base: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HonesError(
            f"no vision-language model at {base!r}: {reason}; name it with --pretrained"
        ) from None
    model.eval()
    return model
