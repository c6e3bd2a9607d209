"""Export a steering as steered weights or as a standard PEFT adapter. Neither needs this package to run."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hones_eval.core.adapters import has_adapter
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import attach_to_anatomy
from hones_eval.core.changes import SiteChange, site_changes
from hones_eval.core.files import staged_folder
from hones_eval.core.folding import linear_changes, why_not_foldable
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError


def export_checkpoint(
    model: PreTrainedModel,
    steering: Steering,
    out: Path,
    also: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Save the model with the scales folded into its weights. The model in memory stays unchanged.

    `also` saves more into the same folder, such as the processor; all of it appears at once.

    Raises: HonesError when the model has an adapter that is not merged, or weights that nothing can be folded
    into (quantized, parametrized), or when a shift needs a bias that the model's layer does not have. Such a
    model would not load again as it was steered.
    """
    anatomy = Anatomy.of(model)
    _refuse_adapters(anatomy.model)
    every_site = [*anatomy.heads_in, *anatomy.neurons_in]
    everything = [SiteChange(site, torch.zeros(site.width)) for site in every_site if site.width]
    for site, _, _ in linear_changes(everything):
        reason = why_not_foldable(anatomy.model, site)
        if reason is not None:
            raise HonesError(
                f"{site.name} {reason}, so this model cannot be exported with the steering in its weights: "
                "export an unquantized base model, or use the steering with attach=hook"
            )
    for change in linear_changes(site_changes(anatomy, steering)):
        if change.shifts is not None and getattr(change.site.module, "bias", None) is None:
            raise HonesError(no_stored_bias(change.site.name))
    attached = attach_to_anatomy(anatomy, steering, "fold")
    try:
        write_folder(out, anatomy.model.save_pretrained, also)
    finally:
        attached.detach()


def no_stored_bias(name: str) -> str:
    """Why a shift cannot be stored in a checkpoint: a layer called `name` has no bias."""
    return (
        f"{name} has no bias in this model's checkpoint, so the shift of its input cannot be stored there: "
        "use the steering with attach=hook or attach=fold"
    )


def export_ia3(model: PreTrainedModel, steering: Steering, out: Path) -> None:
    """Save a PEFT (IA)^3 adapter that multiplies the inputs of `o_proj` and `down_proj` by the scales.

    `peft.PeftModel.from_pretrained(model, out)` gives the steered model. Layers whose scales are all 1 are
    left out. The files are written directly: an adapter that is on the model in memory is not touched.

    Raises: HonesError when the model has an adapter already: (IA)^3 cannot be loaded on top of it.
    """
    from peft import IA3Config

    anatomy = Anatomy.of(model)
    _refuse_adapters(anatomy.model)
    steering.check_fits(anatomy.shape, type(anatomy.model).__name__)
    if steering.has_shifts:
        raise HonesError(
            "an (IA)^3 adapter multiplies, and cannot hold the shifts of this steering: use --to checkpoint, "
            "where the layers have biases, or the steering itself"
        )
    names = {module: name for name, module in anatomy.model.named_modules()}
    changes = site_changes(anatomy, steering)
    inside = [change.site.name for change in changes if change.site.module not in names]
    if inside:
        raise HonesError(
            f"{inside[0]}: the scales of experts do not fit into an IA3 adapter; use --to checkpoint"
        )
    scales = {names[change.site.module]: change.scales for change in changes}
    if not scales:
        raise HonesError("every scale is 1: there is nothing to export")
    config = IA3Config(
        target_modules=list(scales),
        feedforward_modules=list(scales),  # these are scaled at their input, as a steering does
        base_model_name_or_path=steering.provenance.base_model,
        revision=steering.provenance.revision,
        inference_mode=True,
    )
    vectors = {f"base_model.model.{name}.ia3_l": values[None].float() for name, values in scales.items()}

    def save(folder: Path) -> None:
        config.save_pretrained(folder)
        save_file(
            {name: values.contiguous() for name, values in vectors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )

    write_folder(out, save)


def _refuse_adapters(model: PreTrainedModel) -> None:
    if has_adapter(model):
        raise HonesError(
            f"{type(model).__name__} has an adapter that is not merged, so an export of it would lose the "
            "adapter or the steering: merge it first (`merge_and_unload` in PEFT), or name it with --peft"
        )


def write_folder(out: Path, *saves: Callable[[Path], object]) -> None:
    """Let each of `saves` write into a temporary folder, then move all files to `out`.

    Raises: OSError or HonesError that names `out`, e.g. when the disk is full; nothing is left then.
    """
    try:
        with staged_folder(out, last=("config.json", "adapter_config.json")) as temporary:
            for save in saves:
                save(temporary)
    except SafetensorError as error:
        raise HonesError(f"{out} could not be written, and nothing was left there: {error}") from None
