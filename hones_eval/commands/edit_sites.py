"""`hones-eval edit-sites`."""

from pathlib import Path

from hones_eval.commands.answer import Answer


def edit_sites(
    model_args: str,
    out: Path,
    set: list[str] | None = None,
    csv: Path | None = None,
) -> Answer:
    """Write a steering from scales that are given by hand.

    The model's configuration says which heads and neurons there are; its weights are not loaded.

    Args:
        model_args: as in lmms-eval --model_args; pretrained= names the model.
        out: the folder to write steering.json and steering.safetensors to.
        set: a site and its scale, "head LAYER.HEAD=SCALE" or "neuron LAYER.NEURON=SCALE", all counted from
            0; "neuron LAYER.NEURON+=SHIFT" adds a number. May be repeated.
        csv: a file with the columns kind, layer, site and scale, and optionally shift; in addition to --set.

    Example:
        hones-eval edit-sites --model_args pretrained=llava-hf/llava-1.5-7b-hf --set "head 3.5=0" \\
            --set "neuron 4.123=2" --out runs/by-hand
    """
    from hones_eval.api.by_hand import edit_sites as make

    steering = make(model_args, set or [], csv=csv, out=out)
    rows = steering.to_rows()
    return Answer(
        [
            f"wrote {out}: {steering!r}",
            f"use it: lmms-eval --model_args {model_args},steering={out}",
        ],
        {"out": str(out), "base_model": steering.provenance.base_model, "sites": [list(row) for row in rows]},
    )
