"""The base model, wrapper and steering of a run, from its arguments and its manifest."""

import re
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Model arguments that select a steering or a device and do not change the base model.
STEERING_KEYS = frozenset({"steering", "strength", "attach", "scope", "condition", "allow_noop"})
PLACE_KEYS = frozenset({"device", "device_map", "batch_size"})
MODEL_KEYS = ("pretrained", "model", "model_version", "model_name", "model_id", "path")
PREFIXES = ("hones_", "vseam_")
SPLITS = re.compile("_(discovery|development|test)$")  # at the end of task names
BASE_WRAPPERS = {"llava": "llava_hf"}  # names that are not the base wrapper's name with a prefix


@dataclass(frozen=True)
class BaseModel:
    """The base model of a run: id or path, revision, and every other argument it was built with."""

    name: str
    revision: str | None
    wrapper: str
    arguments: tuple[tuple[str, str], ...] = ()
    weights: str | None = None

    def differences(self, other: "BaseModel") -> list[str]:
        """Sentences that say how another base model differs; empty if it does not."""
        found = []
        for what in ("name", "revision", "wrapper"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs and None not in (mine, theirs):  # a run without a manifest knows no revision
                found.append(f"the base {what} is {theirs} here and {mine} in the baseline")
        if self.weights != other.weights and None not in (self.weights, other.weights):
            found.append(
                f"the weights at {self.name} differ: {other.weights} here and {self.weights} in the baseline"
            )
        if self.arguments != other.arguments:
            names = sorted({key for key, _ in set(self.arguments) ^ set(other.arguments)})
            found.append(f"the model arguments differ: {', '.join(names)}")
        return found


@dataclass(frozen=True)
class SteeringRef:
    """The steering of a run, as recorded in its logs."""

    path: str
    digest: str | None
    strength: float
    attach: str
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    scope: str = "all"
    condition: str = "none"
    acted: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict, compare=False, hash=False)
    """By task, for each steering with a condition: on how many prompts it acted, of how many."""

    @property
    def identity(self) -> tuple[str, float, str, str, str]:
        """Equal for two runs with the same steering: by digest if known, else by path."""
        return (self.digest or self.path, self.strength, self.attach, self.scope, self.condition)

    def acted_on(self, task: str) -> str:
        """On how many prompts of a task the steering acted, as text; empty for one without a condition."""
        counts = self.acted.get(task, ())
        return "; ".join(f"acted on {acted} of {prompts} prompts" for acted, prompts in counts)

    @property
    def chosen_for(self) -> tuple[str, ...]:
        """The tasks whose examples were used to choose this steering, without repeats."""
        tasks = [str(chosen["task"]) for chosen in self.example_sets if "task" in chosen]
        return tuple(dict.fromkeys(tasks))

    @property
    def meant_for(self) -> tuple[str, ...]:
        """The tasks that the steering was chosen for, without the suffix of their split."""
        return tuple(dict.fromkeys(SPLITS.sub("", task) for task in self.chosen_for))

    @property
    def example_sets(self) -> list[Mapping[str, Any]]:
        """The sets of discovery and development examples that the provenance lists."""
        listed = self.provenance.get("examples") or []
        return [entry for entry in listed if isinstance(entry, Mapping)]

    @property
    def is_control(self) -> bool:
        """Whether the bank was drawn at random, as a control."""
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
        if self.scope != "all":
            words += f" on {self.scope}"
        if self.condition != "none":
            words += f" if {self.condition.rstrip('/').split('/')[-1]}"
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
    """The base model of a run without a manifest, from its arguments."""
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
    """The steering named in a run's arguments; its digest is unknown."""
    path = arguments.get("steering")
    if path in (None, "", "None"):
        return None
    strength = arguments.get("strength", "1.0")
    try:
        factor = float(strength)
    except ValueError:
        factor = float("nan")
    if strength.startswith("["):  # one for each of several steerings, which the recorded scales contain
        factor = 1.0
    scope = _for_each(arguments.get("scope", "all"), _plain_scope)
    condition = _for_each(arguments.get("condition", "none"), lambda text: text)
    attach = arguments.get("attach", "hook")
    return SteeringRef(str(path), None, factor, attach, scope=scope, condition=condition)


def _plain_scope(scope: str) -> str:
    """A scope as manifests have it: `all` for each that names every token."""
    names = {*scope.split("+")}
    everything = "all" in names or {"generated", "prompt"} <= names or {"image", "text", "generated"} <= names
    return "all" if everything else scope


def _for_each(text: str, read: Callable[[str], str]) -> str:
    """A value, or the values of a list for several steerings with `|` between them."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if not text.startswith("["):
        return read("none" if text == "None" else text)
    try:
        values = literal_eval(text.replace("null", "None"))
    except (ValueError, SyntaxError):
        return text
    texts = [read("none" if value is None else str(value)) for value in values]
    return texts[0] if len(set(texts)) == 1 else "|".join(texts)
