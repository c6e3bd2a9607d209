"""A steering from values given by hand, checked against a model's configuration."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hones_eval.core.lock import writes_to_out
from hones_eval.core.site_texts import read_sites
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, first_line


@writes_to_out
def edit_sites(
    model_args: str,
    sites: Sequence[str] = (),
    *,
    csv: Path | None = None,
    out: Path | None = None,
) -> Steering:
    """Make a steering from scales given by hand. The model is not loaded: only its configuration is read.

    Args:
        model_args: as in lmms-eval --model_args. `pretrained` names the model, `revision` its commit, `peft`
            its adapter; the other arguments do not matter.
        sites: texts such as `head 3.5=0`, `neuron 4.123=2` or, to add a number, `neuron 4.123+=0.5`.
        csv: a file with the columns kind, layer, site and scale, and optionally shift.
        out: the folder to save the steering to.

    Raises: HonesError for a site that the model does not have, a text or row that cannot be read, or values
        that change nothing.
    """
    from hones_eval.api.model_anatomy import empty_model
    from hones_eval.core.anatomy import Anatomy
    from hones_eval.lmms.arguments import parsed

    given = read_sites(sites, csv)
    arguments = parsed(model_args)
    name = arguments.get("pretrained")
    if not name:
        raise HonesError("--model_args should name the model, as in pretrained=org/name")
    config = _config(str(name), arguments)
    anatomy = Anatomy.of(empty_model(config, str(name)))
    steering = Steering.by_hand(anatomy, given.heads, given.neurons, neuron_shifts=given.neuron_shifts)
    if steering.is_noop:
        raise HonesError(
            "every scale is 1, and nothing is added: this steering would change nothing, so it was not "
            "written"
        )
    adapter = arguments.get("peft")
    source = replace(
        steering.provenance,
        base_model=str(name),
        revision=getattr(config, "_commit_hash", None),
        adapter=None if adapter is None else str(adapter),
    )
    steering = replace(steering, provenance=source)
    if out is not None:
        steering.save(out)
    return steering


def _config(name: str, arguments: dict[str, Any]) -> Any:
    """The configuration of a model. Raises: HonesError when there is none."""
    from transformers import AutoConfig

    from hones_eval.core.files import check_folder

    check_folder("pretrained", name)
    taken = {key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments}
    try:
        return AutoConfig.from_pretrained(name, **taken)
    except (OSError, ValueError, KeyError) as error:
        raise HonesError(f"no configuration at {name!r}: {first_line(error)}") from None
