"""Conditions: on which inputs a steering acts.

A `Condition` reads the residual stream at the input of one layer, at the last token of the prompt, and holds
where its product with a direction is above a threshold. A `TextCondition` holds where a regular expression
occurs in the prompt. The decision is made once per prompt, from the unsteered model, and stays for the whole
answer (`hones_eval.core.scope` follows the model's passes and applies it).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.core.artifact import ModelShape, Provenance, digest, load_artifact, save_artifact
from hones_eval.core.files import exists
from hones_eval.errors import HonesError, MisfitError

PATTERN = "re:"
"""What a regular expression starts with in `condition=`."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Holds where the residual stream's product with a direction is above a threshold.

    Attributes:
        layer: whose input is read, from 0.
        direction: [hidden] float32.
        threshold: what the product is compared with.
        provenance: the model, the tasks and the examples that it was learned from.
        report: precision and recall on held-out examples.
        negated: act where it does not hold.
        name: how messages and manifests call it.
    """

    layer: int
    direction: Tensor
    threshold: float
    provenance: Provenance
    report: dict[str, Any] = field(default_factory=dict)
    negated: bool = False
    name: str = "a condition"

    def __post_init__(self) -> None:
        """Check the direction and the layer against the shape of the model."""
        shape = self.provenance.shape
        if not 0 <= self.layer < shape.layers:
            raise HonesError(f"the condition reads layer {self.layer}; its model has {shape.layers} layers")
        if tuple(self.direction.shape) != (shape.hidden,):
            raise MisfitError(
                f"the direction has the shape {tuple(self.direction.shape)}, its model needs "
                f"({shape.hidden},)"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of layer, direction and threshold, apart from whether it is negated."""
        numbers = torch.tensor([float(self.layer), self.threshold])
        return digest({"direction": self.direction, "numbers": numbers})

    def holds(self, hidden: Tensor) -> Tensor:
        """Whether to act, bool [rows], given the residual stream [rows, hidden] at the last prompt token."""
        found = hidden.float() @ self.direction.to(hidden.device) > self.threshold
        return ~found if self.negated else found

    def check_fits(self, shape: ModelShape, name: str) -> None:
        """Raise MisfitError, naming both sides, when the model called `name` has another shape."""
        differing = self.provenance.shape.differences(shape)
        if differing:
            raise MisfitError(
                f"the condition for {self.provenance.base_model} does not fit {name} ({'; '.join(differing)})"
            )

    def save(self, folder: str | Path) -> None:
        """Write `condition.json` and `condition.safetensors` into `folder`."""
        extra = {"layer": self.layer, "threshold": self.threshold, "report": self.report}
        save_artifact(Path(folder), "condition", self.provenance, {"direction": self.direction}, extra)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder written by `save`. Raises: HonesError when there is none, or it is damaged."""
        header, provenance, tensors = load_artifact(Path(folder), "condition")
        layer, threshold, report = (header.get(key) for key in ("layer", "threshold", "report"))
        if type(layer) is not int or type(threshold) not in (int, float) or set(tensors) != {"direction"}:
            raise HonesError(f"{folder} is no condition: it needs layer, threshold and direction")
        report = report if isinstance(report, dict) else {}
        number = float(threshold)  # type: ignore[arg-type]  # checked above
        return cls(layer, tensors["direction"], number, provenance, report, name=str(folder))


@dataclass(frozen=True)
class TextCondition:
    """Holds where a regular expression occurs in the text of the prompt, without special and image tokens.

    Attributes:
        pattern: as for `re.search`; `(?i)` in front ignores case.
        tokenizer: decodes prompts.
        negated: act where it does not occur.
    """

    pattern: str
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False)
    negated: bool = False

    def __post_init__(self) -> None:
        """Raise HonesError for a pattern that is none."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise HonesError(
                f"condition={PATTERN}{self.pattern} is not a regular expression: {error}"
            ) from None

    layer = None

    @property
    def name(self) -> str:
        """As in `condition=`."""
        return f"{'!' if self.negated else ''}{PATTERN}{self.pattern}"

    @property
    def digest(self) -> str:
        """SHA-256 of the pattern, apart from whether it is negated."""
        return hashlib.sha256(self.pattern.encode()).hexdigest()

    def holds(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Whether to act, bool [rows], given the text tokens of each prompt."""
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            raise HonesError(
                f"condition={self.name} needs a tokenizer: TextCondition({self.pattern!r}, tokenizer)"
            )
        texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in prompts]
        found = torch.tensor([re.search(self.pattern, text) is not None for text in texts])
        return ~found if self.negated else found


AnyCondition = Condition | TextCondition


def parse_conditions(text: str) -> tuple[AnyCondition, ...]:
    """The conditions of `condition=`: folders joined by +, each negated by a `!` before it, or `re:PATTERN`.

    All of several have to hold. A regular expression is the whole text, as it may contain a plus.

    Raises: HonesError for a folder without a condition, a broken pattern, or conditions that contradict.
    """
    text = text.strip()
    if not text:
        raise HonesError("condition= is empty: give a folder, re:PATTERN, or leave it out")
    if text.removeprefix("!").startswith(PATTERN):
        pattern = text.removeprefix("!").removeprefix(PATTERN)
        return (TextCondition(pattern, negated=text.startswith("!")),)
    found: list[AnyCondition] = []
    for part in [text] if exists(text.removeprefix("!")) else text.split("+"):
        path = part.strip().removeprefix("!")
        if not path:
            raise HonesError(f"condition={text}: a part has no folder: write FOLDER+!FOLDER")
        loaded = Condition.load(path)
        found.append(replace(loaded, negated=part.strip().startswith("!"), name=part.strip()))
    return check_conditions(found)


def check_conditions(conditions: Sequence[AnyCondition]) -> tuple[AnyCondition, ...]:
    """The conditions without repeats. Raises: HonesError when one and its opposite are among them."""
    found: dict[str, AnyCondition] = {}
    for condition in conditions:
        known = found.setdefault(condition.digest, condition)
        if known.negated != condition.negated:
            raise HonesError(
                f"conditions {known.name} and {condition.name} contradict: together they never hold, so the "
                "steering would never act"
            )
    return tuple(found.values())
