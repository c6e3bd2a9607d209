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
    peft: str | None = None,
    strength: float = 1.0,
) -> Answer:
    """Write a steering as steered weights or as a PEFT adapter; neither needs this package to run.

    Args:
        steering: a folder that scale wrote, or a Hugging Face hub id.
        to: the form; checkpoint is weights with the scales folded in and the processor, ia3 a PEFT adapter.
        out: the folder to write to.
        pretrained: the base model's folder or hub id; by default the one that the steering names.
        peft: the folder or hub id of a PEFT adapter to merge into the checkpoint; by default the one that the
            steering names.
        strength: a scale s becomes 1 + strength * (s - 1).

    Example:
        hones-eval export --steering runs/vqa/steering --to checkpoint --out runs/vqa/steered-model
    """
    from hones_eval.core.adapters import adapter_base, load_adapter
    from hones_eval.core.export import export_checkpoint, export_ia3
    from hones_eval.core.steering import Steering

    loaded = Steering.load(steering).at_strength(strength)
    if loaded.is_noop:
        raise HonesError(f"{steering} at strength {strength:g}: every scale is 1, there is nothing to export")
    base = pretrained or loaded.provenance.base_model
    source = loaded.provenance
    adapter, revision = (peft, None) if peft else (source.adapter, source.adapter_revision)
    if adapter is None and (named := adapter_base(base)) is not None:
        base, adapter = named, base
    if out.resolve() in {Path(path).resolve() for path in (base, adapter) if path is not None}:
        raise HonesError(f"--out {out} is the base model's own folder: give another one")
    if adapter is not None and to == "ia3":
        raise HonesError(
            f"an (IA)^3 adapter cannot be loaded on top of the adapter {adapter}: use --to checkpoint, which "
            "merges it"
        )
    model = _model(base)
    if adapter is not None:
        load_adapter(model, adapter, revision=revision, merge=True)
    if to == "ia3":
        export_ia3(model, loaded, out)
    else:
        from transformers import AutoProcessor

        export_checkpoint(model, loaded, out, AutoProcessor.from_pretrained(base).save_pretrained)
    model_name = base if adapter is None else f"{base} with {adapter} merged"
    return Answer(
        [f"wrote {out}: {model_name} steered, as {to}"],
        {"out": str(out), "base_model": base, "adapter": adapter, "to": to, "strength": strength},
    )


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
