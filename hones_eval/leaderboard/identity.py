"""What a run was: its base model, wrapper and steering, read from its arguments and its manifest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Arguments of a model that choose a steering, or where it runs, and leave the base model the same.
STEERING_KEYS = frozenset({"steering", "strength", "attach", "allow_noop"})
PLACE_KEYS = frozenset({"device", "device_map", "batch_size"})
MODEL_KEYS = ("pretrained", "model", "model_version", "model_name", "model_id", "path")
PREFIXES = ("hones_", "vseam_")
SPLITS = re.compile("_(discovery|development|test)$")  # at the end of the names of tasks
BASE_WRAPPERS = {"llava": "llava_hf"}  # our names that are not their base wrapper's name with a prefix


@dataclass(frozen=True)
class BaseModel:
    """The model under a run: its id or path, its revision, and every other argument it was built with."""

    name: str
    revision: str | None
    wrapper: str
    arguments: tuple[tuple[str, str], ...] = ()

    def differences(self, other: "BaseModel") -> list[str]:
        """Say in words how the other base model differs; empty when it does not."""
        found = []
        for what in ("name", "revision", "wrapper"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs and None not in (mine, theirs):  # a run without a manifest knows no revision
                found.append(f"the base {what} is {theirs} here and {mine} in the baseline")
        if self.arguments != other.arguments:
            names = sorted({key for key, _ in set(self.arguments) ^ set(other.arguments)})
            found.append(f"the model arguments differ: {', '.join(names)}")
        return found


@dataclass(frozen=True)
class SteeringRef:
    """The steering of a run, as far as its logs tell."""

    path: str
    digest: str | None
    strength: float
    attach: str
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def identity(self) -> tuple[str, float, str]:
        """Equal for two runs that were steered alike: by content where it is known, by path otherwise."""
        return (self.digest or self.path, self.strength, self.attach)

    @property
    def chosen_for(self) -> tuple[str, ...]:
        """The tasks whose examples chose this steering, without repeats."""
        tasks = [str(one["task"]) for one in self.example_sets if "task" in one]
        return tuple(dict.fromkeys(tasks))

    @property
    def meant_for(self) -> tuple[str, ...]:
        """What is tested of the tasks that chose it: a task without the `_discovery` or `_development`."""
        return tuple(dict.fromkeys(SPLITS.sub("", task) for task in self.chosen_for))

    @property
    def example_sets(self) -> list[Mapping[str, Any]]:
        """The sets of discovery and development examples that the provenance lists."""
        listed = self.provenance.get("examples") or []
        return [one for one in listed if isinstance(one, Mapping)]

    @property
    def is_control(self) -> bool:
        """Whether the bank was drawn at random, to be compared with and not to be used."""
        settings = self.provenance.get("settings")
        how = settings.get("how") if isinstance(settings, Mapping) else None
        return "random" in (str(self.provenance.get("method")), str(how))

    @property
    def label(self) -> str:
        """A short name for tables: method, how the scales were chosen, and for which task."""
        settings = self.provenance.get("settings")
        how = str(settings["how"]) if isinstance(settings, Mapping) and "how" in settings else ""
        method = str(self.provenance.get("method") or "")
        words = " ".join(word for word in (method, how) if word) or self.path.rstrip("/").split("/")[-1]
        if self.meant_for:
            words += f" for {'+'.join(self.meant_for)}"
        if self.strength != 1.0:
            words += f" ×{self.strength:g}"
        return words


def parse_arguments(arguments: str | Mapping[str, Any] | None) -> dict[str, str]:
    """Read lmms-eval's `model_args`: a mapping, or `a=b,c=d`; commas in quotes or brackets do not split."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, Mapping):
        return {str(key): str(value) for key, value in arguments.items()}
    pairs = (part.partition("=") for part in _split_outside(str(arguments)))
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip()}


def _split_outside(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def base_from_arguments(wrapper: str, arguments: Mapping[str, str]) -> BaseModel:
    """The base model that a run without a manifest names in its arguments."""
    name = next((arguments[key] for key in MODEL_KEYS if key in arguments), wrapper)
    left_out = STEERING_KEYS | PLACE_KEYS | set(MODEL_KEYS) | {"revision", "base"}
    others = tuple(sorted((key, value) for key, value in arguments.items() if key not in left_out))
    return BaseModel(name, arguments.get("revision"), base_wrapper(wrapper, arguments), others)


def base_wrapper(wrapper: str, arguments: Mapping[str, str]) -> str:
    """The stock lmms-eval wrapper under one of ours (`hones_llava`: `llava_hf`), or the wrapper itself."""
    if wrapper in ("hones", "vseam"):
        return arguments.get("base", wrapper)
    for prefix in PREFIXES:
        if wrapper.startswith(prefix):
            stem = wrapper.removeprefix(prefix)
            return BASE_WRAPPERS.get(stem, stem)
    return wrapper


def steering_from_arguments(arguments: Mapping[str, str]) -> SteeringRef | None:
    """The steering that a run names in its arguments; its content is not known from them."""
    path = arguments.get("steering")
    if path in (None, "", "None"):
        return None
    strength = arguments.get("strength", "1.0")
    try:
        factor = float(strength)
    except ValueError:
        factor = float("nan")
    return SteeringRef(str(path), None, factor, arguments.get("attach", "hook"))
