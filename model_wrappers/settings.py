"""Generation settings that a user gives with `--gen_kwargs`: they reach the model, or the run stops.

Wrappers of lmms-eval pass on only some settings, and a task's own may contradict the user's. A run that
ignores a setting looks like one that used it.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from lmms_eval.api.instance import Instance, unwrap_generation_output
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hones_eval.errors import HonesError
from hones_eval.lmms.answers.registry import own_settings
from hones_eval.lmms.arguments import parsed_settings
from hones_eval.lmms.call_capture import StandInForGenerate, replaced
from hones_eval.lmms.calls import quiet

OF_WRAPPERS = {"until", "image_aspect_ratio", "max_gen_toks", "skip_special_tokens"}
"""Settings that wrappers take in addition to those of `generate`."""
OF_SAMPLING = {"top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"}
"""Settings without effect on greedy answers."""
RECORDED = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "repetition_penalty")


def wanted_settings(gen_kwargs: Any) -> dict[str, Any]:
    """The user's settings from the value of `--gen_kwargs`.

    Raises: HonesError when it cannot be parsed, or a name is misspelt.
    """
    if not gen_kwargs:
        return {}
    wanted = dict(gen_kwargs) if isinstance(gen_kwargs, Mapping) else parsed_settings(str(gen_kwargs))
    known = [*GenerationConfig().to_dict(), *OF_WRAPPERS, *own_settings()]
    for name in wanted:
        near = get_close_matches(name, known, n=1)
        if name not in known and near:
            raise HonesError(f"--gen_kwargs {name}: no such setting; did you mean {near[0]}?")
    return wanted


def refuse_contradiction(wanted: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a user's temperature on a task with `do_sample: false`; wrappers disagree on which counts."""
    if _positive(wanted.get("temperature")) and settings.get("do_sample") is False:
        raise HonesError(
            f"--gen_kwargs temperature={wanted['temperature']}: the task sets do_sample to false, so the "
            "temperature has no effect; add do_sample=true to sample, or temperature=0 to stay greedy"
        )


def until(settings: Mapping[str, Any]) -> list[str]:
    """The strings that end an answer. Raises: HonesError when they are neither a text nor a list of texts."""
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise HonesError(f"until={stops!r} should be a text or a list of texts")
    return list(stops)


def ends_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generate_until: Callable[[list[Instance]], list[Any]],
    request: Instance,
    stop: str,
) -> bool | None:
    """Whether a wrapper ends answers at a string, found by playing an answer with the string through it.

    Args:
        model: inside the wrapper.
        tokenizer: the model's.
        generate_until: the wrapper's.
        request: one with the string among its `until`.
        stop: the string.

    Returns: None when the tokenizer cannot write the string.
    """
    ids = tokenizer.encode(f"one{stop}two", add_special_tokens=False)
    text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    if stop not in text:
        return None
    stand_in = StandInForGenerate(model, ids, with_prompt=True)
    with replaced(model, "generate", stand_in), quiet():
        whole = str(unwrap_generation_output(generate_until([request])[0])[0])
    return text not in whole


def settings_reached(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which one call of `generate` decodes, as the run manifest records them."""
    return {name: _effective(model, kwargs, name) for name in RECORDED}


def check_reached(model: PreTrainedModel, wanted: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Raise HonesError when a setting that the user gave is not among the arguments of `generate`."""
    known = GenerationConfig().to_dict()
    greedy = not _effective(model, kwargs, "do_sample")
    for name, value in wanted.items():
        if name not in known or (greedy and name in OF_SAMPLING):
            continue
        if name == "temperature" and greedy and not _positive(value):
            continue
        found = _effective(model, kwargs, name)
        if not _same(found, value):
            raise HonesError(
                f"--gen_kwargs {name}={value} did not reach the model: the wrapper generates with "
                f"{name}={found}. Leave the setting out, or use a wrapper that passes it on: --model hones_hf"
            )


def _effective(model: PreTrainedModel, kwargs: Mapping[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    config = kwargs.get("generation_config") or model.generation_config
    found = getattr(config, name, None)
    return DEFAULTS.get(name) if found is None else found


DEFAULTS = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "repetition_penalty": 1.0}
"""What `generate` uses for settings that neither a call nor a checkpoint names."""


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return list(found) == list(wanted)
    if isinstance(found, bool) or isinstance(wanted, bool):
        return bool(found) == bool(wanted)
    return bool(found == wanted)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
