"""The steerings that `steering=`, `strength=`, `scope=` and `condition=` of a wrapper name."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hones_eval.core.attach import Part
from hones_eval.core.combining import parts_of
from hones_eval.core.condition import TextCondition, parse_conditions
from hones_eval.core.scope import Scope
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError

SEPARATOR = "|"
"""Between the scopes and the conditions of several steerings, in manifests."""


class Named(NamedTuple):
    """Steerings to attach together, and how a run manifest describes them.

    `whole` is all of them combined, and `strength` what it is scaled by. `scope` and `condition` have one
    text for all, or several with `|` between them.
    """

    parts: list[Part]
    whole: Steering
    strength: float
    scope: str
    condition: str

    @property
    def acts_on_prompts(self) -> bool:
        """Whether the first prompt is surely changed: no condition, and a scope with tokens of the prompt."""
        everywhere = all(not part.conditions for part in self.parts)
        return everywhere and all(part.scope.acts_on_prompt for part in self.parts)

    @property
    def conditions(self) -> list[str]:
        """The digests of all conditions, with a sign for those that are negated."""
        found = [condition for part in self.parts for condition in part.conditions]
        return [f"{'!' if condition.negated else ''}{condition.digest}" for condition in found]

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "Named":
        """The same, with a tokenizer for conditions on texts."""
        parts = [
            part._replace(
                conditions=tuple(
                    replace(c, tokenizer=tokenizer) if isinstance(c, TextCondition) else c
                    for c in part.conditions
                )
            )
            for part in self.parts
        ]
        return self._replace(parts=parts)


def named_steerings(path: str, strength: Any, scope: Any, condition: Any) -> Named:
    """Load the steerings that a wrapper's arguments name.

    Args:
        path: a folder or hub id, or several joined by +.
        strength: a number; or a list with one for each of several steerings.
        scope: a text; or a list with one for each.
        condition: None or a text; or a list with one for each, None or `none` where there is none.

    Raises: HonesError for a missing folder, a list of another length, or a value that cannot be read.
    """
    given = {"strength": strength, "scope": scope, "condition": condition}
    lists = {name: value for name, value in given.items() if isinstance(value, list)}
    if not lists:
        part = Part(_load(path), number(strength), Scope.parse(scope), _conditions(condition))
        return Named([part], part.steering, part.strength, _scope(part.scope), _text(condition))
    names = parts_of(path)
    for name, value in lists.items():
        if len(value) != len(names):
            raise HonesError(
                f"{name}={value} has {_counted(len(value), 'value')}, and steering={path} "
                f"{_counted(len(names), 'steering')}: give one value for each, or one for all"
            )
    columns = [value if isinstance(value, list) else [value] * len(names) for value in given.values()]
    parts = [
        Part(_load(name.path), name.strength * number(own), Scope.parse(where), _conditions(when))
        for name, own, where, when in zip(names, *columns, strict=True)
    ]
    whole = Steering.combine([(part.steering, part.strength) for part in parts])
    scopes, conditions = [_scope(part.scope) for part in parts], [_text(when) for when in columns[2]]
    return Named(parts, whole, 1.0, _joined(scopes), _joined(conditions))


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _joined(texts: Sequence[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else SEPARATOR.join(texts)


def _scope(scope: Scope) -> str:
    return "all" if scope.is_all else str(scope)


def _text(condition: Any) -> str:
    return "none" if condition in (None, "none") else str(condition)


def _conditions(text: Any) -> Any:
    if text in (None, "none"):
        return ()
    if not isinstance(text, str):
        raise HonesError(f"condition={text!r} should be a folder, re:PATTERN or none")
    return parse_conditions(text)


def number(strength: object) -> float:
    """A strength. Raises: HonesError when it is not a number."""
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise HonesError(f"strength={strength!r} should be a number")
    return float(strength)


def _load(path: str) -> Steering:
    """The steering of a folder or hub id. Raises: HonesError for a missing folder, or one with a ranking."""
    folder = Path(path)
    if (folder / "ranking.json").is_file() and not (folder / "steering.json").is_file():
        raise HonesError(
            f"steering={path} is a ranking: make a steering of it with hones-eval scale --ranking {path} "
            "--out DIR"
        )
    return Steering.load(path)
