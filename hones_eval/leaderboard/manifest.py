"""Run manifests: facts about a run that lmms-eval does not record, written by our wrappers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hones_eval import limits
from hones_eval.core.files import read_bounded
from hones_eval.errors import HonesError
from hones_eval.leaderboard.identity import SteeringRef
from hones_eval.leaderboard.schemas import ManifestFile, SteeringRecord, parsed
from hones_eval.leaderboard.text import path_name

Integers = NDArray[np.int64]
FORMAT = "hones-eval run manifest"
FORMAT_VERSION = 1
REQUESTS_KEY, SAME = '"requests": ', "as in the last manifest"


@dataclass(frozen=True)
class Shown:
    """What one example showed to the model: a hash of prompt and images, and the hash of each image."""

    content: int
    images: tuple[str, ...]


class ShownColumns(NamedTuple):
    """What examples showed to the model: one hash per example `[n]`, and the images of each."""

    content: Integers
    images: tuple[tuple[str, ...], ...]


class Requests:
    """What a task's examples showed to the model, by `doc_id`."""

    def __init__(self, shown: Mapping[int, Shown]) -> None:
        """Keep the examples."""
        self._shown = shown
        self._last: tuple[Integers, ShownColumns | None] = (np.empty(0, np.int64), None)

    def columns(self, doc_ids: Integers) -> ShownColumns | None:
        """The examples in the order of `doc_ids`; None if one of them is not known."""
        if not np.array_equal(self._last[0], doc_ids):  # the runs of a board mostly have the same examples
            self._last = (doc_ids, self._columns(doc_ids))
        return self._last[1]

    def _columns(self, doc_ids: Integers) -> ShownColumns | None:
        listed = [self._shown.get(doc_id) for doc_id in doc_ids.tolist()]
        known = [shown for shown in listed if shown is not None]
        if len(known) < len(listed):
            return None
        content = np.array([shown.content for shown in known], dtype=np.int64)
        return ShownColumns(content, tuple(shown.images for shown in known))

    @classmethod
    def joined(cls, parts: Sequence["Requests"]) -> "Requests":
        """The requests of several processes of one run."""
        return (
            parts[0]
            if len(parts) == 1
            else cls({doc: shown for part in parts for doc, shown in part._shown.items()})
        )


@dataclass(frozen=True)
class Manifest:
    """One process's record of one run of lmms-eval; `results` names the results file, if one was written."""

    path: Path
    base_name: str
    base_revision: str | None
    base_weights: str | None
    wrapper: str
    base_wrapper: str
    steering: SteeringRef | None
    requests: Mapping[str, Requests]
    errors: tuple[tuple[str, str], ...]
    versions: Mapping[str, str]
    created: datetime
    rank: int
    results: str | None
    ignored_until: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By task, the strings that should end answers and that the wrapper ignores."""

    def errors_of(self, task: str) -> list[str]:
        """Errors raised while a task was generated; errors without a task count for all tasks."""
        return [text for name, text in self.errors if name in (task, "")]


class SharedRequests:
    """A cache of the last manifest's requests: most runs of a board show exactly the same ones."""

    def __init__(self) -> None:
        """Start with none."""
        self._last: dict[str, tuple[Mapping[str, Any], Requests]] = {}
        self._text, self._content = "", None

    def decode(self, text: str) -> Any:
        """Decode a manifest; requests with the same text as the last ones are not decoded again."""
        if self._text and self._text in text:
            content = json.loads(text.replace(self._text, f'{REQUESTS_KEY}"{SAME}"', 1))
            if isinstance(content, dict) and content.get("requests") == SAME:
                return content | {"requests": self._content}
        content = json.loads(text)
        if isinstance(content, dict) and (start := text.find(REQUESTS_KEY)) >= 0:
            begin = start + len(REQUESTS_KEY)
            try:
                found, end = json.JSONDecoder().raw_decode(text, begin)
            except ValueError:
                return content
            if isinstance(found, dict) and found == content.get("requests"):
                self._text, self._content = text[start:end], content["requests"]
        return content

    def of(self, task: str, listed: Mapping[str, Any]) -> Requests:
        """The requests of one task, the very object of the last time if nothing differs."""
        last = self._last.get(task)
        if last is None or (last[0] is not listed and last[0] != listed):
            last = self._last[task] = (listed, Requests(_requests(listed)))
        return last[1]


def read_manifest(path: Path, shared: SharedRequests) -> Manifest:
    """Read one `hones_manifest_*.json`.

    Raises: HonesError when the file is not JSON, not a manifest, of another version, or misses a field.
    """
    try:
        content = shared.decode(read_bounded(path, limits.MANIFEST_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise HonesError(f"{path_name(path)} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise HonesError(f"{path_name(path)} is not a run manifest: its 'format' is not {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        raise HonesError(
            f"{path_name(path)} has manifest format {content.get('format_version')}, not {FORMAT_VERSION}"
        )
    checked = parsed(
        ManifestFile, content, lambda problem: f"{path_name(path)} is not as we write manifests ({problem})"
    )
    try:
        created = datetime.fromisoformat(checked.created)
        requests = {str(task): shared.of(task, listed) for task, listed in content["requests"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise HonesError(f"{path_name(path)} is not as we write manifests ({error!r})") from None
    return _manifest(path, checked, requests, created if created.tzinfo else created.replace(tzinfo=UTC))


def _manifest(
    path: Path, content: ManifestFile, requests: Mapping[str, Requests], created: datetime
) -> Manifest:
    versions = ("package_version", "lmms_eval_version", "torch_version", "transformers_version")
    return Manifest(
        path=path,
        base_name=content.base_model.id,
        base_revision=content.base_model.revision,
        base_weights=content.base_model.weights,
        wrapper=content.wrapper,
        base_wrapper=content.base_wrapper,
        steering=None if content.steering is None else _steering(content.steering),
        requests=requests,
        errors=tuple((error.task or "", f"doc_id {error.doc_id}: {error.error}") for error in content.errors),
        versions={name: value for name in versions if (value := getattr(content, name)) is not None},
        created=created,
        rank=content.rank,
        results=content.results,
        ignored_until={task: until.strings for task, until in content.until.items() if until.obeyed is False},
    )


def _steering(content: SteeringRecord) -> SteeringRef:
    return SteeringRef(
        path=content.path,
        digest=content.digest,
        strength=content.strength,
        attach=content.attach,
        scope=content.scope,
        condition=content.condition,
        acted=content.acted,
        provenance=content.provenance.model_dump(exclude_none=True),
    )


def _requests(listed: Mapping[str, Mapping[str, Any]]) -> dict[int, Shown]:
    found = {}
    for doc_id, entry in listed.items():
        prompt, images = str(entry["prompt_sha256"]), tuple(map(str, entry["image_sha256"]))
        found[int(doc_id)] = Shown(hash((prompt, images)), images)
    return found
