"""`hones-eval export`."""

from pathlib import Path
from typing import TYPE_CHECKING

from hones_eval.choices import Export
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError, UnsupportedModelError
from hones_eval.notes import note

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hones_eval.core.adapters import ModelSource
    from hones_eval.core.steering import Steering


def export(
    steering: str,
    to: Export,
    out: Path,
    pretrained: str | None = None,
    peft: str | None = None,
    strength: float = 1.0,
) -> Answer:
    """Write a steering as steered weights or as a PEFT adapter; neither needs this package to run.

    Steered weights are a copy of the model's files with a few columns multiplied: names, types, configuration
    and processor stay byte for byte, and the model is not loaded. Where that is not possible (merged
    adapters, stacked experts, weights that are not safetensors), the model is loaded and saved.

    Args:
        steering: a folder that scale wrote, or a Hugging Face hub id.
        to: the form; checkpoint is weights with the scales folded in and the processor, ia3 a PEFT adapter.
        out: the folder to write to.
        pretrained: the base model's folder or hub id, also org/name@revision; by default the one that the
            steering names, at the commit that it was made with.
        peft: the folder or hub id of a PEFT adapter to merge into the checkpoint; by default the one that the
            steering names.
        strength: a scale s becomes 1 + strength * (s - 1).

    Example:
        hones-eval export --steering runs/vqa/steering --to checkpoint --out runs/vqa/steered-model
    """
    from hones_eval.core.adapters import adapter_base, load_adapter
    from hones_eval.core.export import export_checkpoint, export_ia3
    from hones_eval.core.hub import split_revision
    from hones_eval.core.steering import Steering

    loaded = Steering.load(steering).at_strength(strength)
    if loaded.is_noop:
        raise HonesError(f"{steering} at strength {strength:g}: every scale is 1, there is nothing to export")
    source = loaded.provenance
    base, commit = pretrained or source.base_model, None if pretrained else source.revision
    if pretrained and not Path(pretrained).exists():
        base, commit = split_revision(pretrained)
    adapter, revision = (peft, None) if peft else (source.adapter, source.adapter_revision)
    if (named := adapter_base(base)) is not None:  # an adapter's folder in place of the base model
        if peft is not None:
            raise HonesError(f"--pretrained {base} and --peft are two adapters; only one is supported")
        base, adapter, revision, commit = named, base, None, None
    if out.resolve() in {Path(path).resolve() for path in (base, adapter) if path is not None}:
        raise HonesError(f"--out {out} is the base model's own folder: give another one")
    if adapter is not None and to == "ia3":
        raise HonesError(
            f"an (IA)^3 adapter cannot be loaded on top of the adapter {adapter}: use --to checkpoint, which "
            "merges it"
        )
    if to == "checkpoint" and adapter is None and _copied(base, commit, loaded, out):
        return _answer(out, base, adapter, to, strength)
    model = _model(base, commit)
    if adapter is not None:
        load_adapter(model, adapter, revision=revision, merge=True)
    if to == "ia3":
        export_ia3(model, loaded, out)
    else:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(base, revision=commit)
        export_checkpoint(model, loaded, out, processor.save_pretrained)
    return _answer(out, base, adapter, to, strength)


def _answer(out: Path, base: str, adapter: str | None, to: str, strength: float) -> Answer:
    model_name = base if adapter is None else f"{base} with {adapter} merged"
    return Answer(
        [f"wrote {out}: {model_name} steered, as {to}"],
        {"out": str(out), "base_model": base, "adapter": adapter, "to": to, "strength": strength},
    )


def _copied(base: str, commit: str | None, steering: "Steering", out: Path) -> bool:
    """Write the steered weights as a copy of the base model's files, without the model in memory.

    Returns: whether that was possible; if not, a note says why the model is loaded and saved instead.
    """
    from transformers import AutoConfig

    from hones_eval.api.model_anatomy import empty_model
    from hones_eval.core.attach import warn_of_another_model
    from hones_eval.core.checkpoint_copy import CannotCopyError, checkpoint_folder, copy_scaled
    from hones_eval.core.export import write_folder

    try:
        empty = empty_model(AutoConfig.from_pretrained(base, revision=commit), base)
        source = checkpoint_folder(base, commit)
    except (OSError, ValueError) as error:
        raise _no_model(base, commit, error) from None
    here: ModelSource = {"base_model": base, "revision": commit, "adapter": None, "adapter_revision": None}
    try:
        write_folder(out, lambda folder: copy_scaled(source, empty, steering, folder))
    except (CannotCopyError, UnsupportedModelError) as reason:
        note(f"loading the whole model, since its files cannot be copied with scaled weights: {reason}")
        return False
    warn_of_another_model(steering.provenance, here)
    return True


def _model(base: str, commit: str | None) -> "PreTrainedModel":
    from transformers import AutoModelForImageTextToText, PreTrainedModel

    try:
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            base, revision=commit, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise _no_model(base, commit, error) from None
    model.eval()
    return model


def _no_model(base: str, commit: str | None, error: Exception) -> HonesError:
    reason = " ".join(str(error).split())[:200]
    at = "" if commit is None else f", commit {commit},"
    return HonesError(f"no vision-language model at {base!r}{at}: {reason}; name it with --pretrained")
