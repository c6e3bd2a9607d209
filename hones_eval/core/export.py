"""Export a steering as steered weights or as a standard PEFT adapter. Neither needs this package to run."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import attach_to_anatomy, scaled_sites
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError


def export_checkpoint(model: PreTrainedModel, steering: Steering, out: Path) -> None:
    """Save the model with the scales folded into its weights. The model in memory stays unchanged."""
    attached = attach_to_anatomy(Anatomy.of(model), steering, "fold")
    try:
        write_folder(out, model.save_pretrained)
    finally:
        attached.detach()


def export_ia3(model: PreTrainedModel, steering: Steering, out: Path) -> None:
    """Save a PEFT (IA)^3 adapter that multiplies the inputs of `o_proj` and `down_proj` by the scales.

    `peft.PeftModel.from_pretrained(model, out)` gives the steered model. Layers whose scales are all 1 are
    left out.
    """
    from peft import IA3Config, get_peft_model

    anatomy = Anatomy.of(model)
    steering.check_fits(anatomy.shape, type(model).__name__)
    names = {module: name for name, module in model.named_modules()}
    scales = {names[site.module]: values for site, values in scaled_sites(anatomy, steering)}
    if not scales:
        raise HonesError("every scale is 1: there is nothing to export")
    config = IA3Config(target_modules=list(scales), feedforward_modules=list(scales))
    adapted: Any = get_peft_model(model, config)
    try:
        for name, values in scales.items():
            _vector(adapted, name).copy_(values)
        write_folder(out, adapted.save_pretrained)
    finally:
        adapted.unload()


def write_folder(out: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a temporary folder next to `out`, then move its files to `out` when all exist."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        save(Path(temporary))
        for path in sorted(Path(temporary).iterdir()):
            shutil.move(path, out / path.name)


def _vector(adapted: Any, name: str) -> Tensor:
    module = adapted.get_submodule(f"base_model.model.{name}")
    vector: Tensor = module.ia3_l["default"].data
    return vector.view(-1)
