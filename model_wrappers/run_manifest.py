"""The run manifest: a file next to lmms-eval's results, with what lmms-eval does not record about a run."""

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from lmms_eval.api.instance import Instance
from PIL.Image import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from hones_eval.core.adapters import adapter_of
from hones_eval.core.artifact import hash_of, write_json
from hones_eval.core.images import image_hash
from hones_eval.core.steering import Steering
from hones_eval.lmms.chat_text import with_context
from hones_eval.version import __version__

Document = tuple[str, Any]
MANIFEST_VERSION = 1
MAKES_INPUT = ("generate_until", "generate_until_agentic", "generate_until_multi_round")


class RunRecord:
    """The model, steering, requests and errors of a run in progress."""

    def __init__(
        self,
        wrapper: Any,
        model: PreTrainedModel,
        model_args: Mapping[str, Any],
        steering: Steering | None,
        settings: Mapping[str, Any],
        weights: str,
    ) -> None:
        """`settings` are path, strength, attach mode, scope and condition of the steering.

        `model_args` are the wrapper's.

        `weights` is the digest of the model's weights without the steering.
        """
        self.weights = weights
        self.steering = steering
        self.base_wrapper: str = wrapper.base_wrapper
        self.rank = int(os.environ.get("RANK", "0"))
        self._settings = dict(settings)
        self._base_model: dict[str, Any] = {
            "id": str(model_args.get("pretrained") or model.config._name_or_path),
            "revision": model_args.get("revision") or getattr(model.config, "_commit_hash", None),
            "weights": weights,
        }
        if (adapter := adapter_of(model)) is not None:
            self._base_model["adapter"] = {"id": adapter.id, "revision": adapter.revision}
        self._requests: dict[int, Instance] = {}
        self._task_dict: Mapping[str, Any] = {}
        self.errors: list[dict[str, Any]] = []
        self.until: dict[str, dict[str, Any]] = {}
        """By task with `until`: the strings, and whether the wrapper ends answers there."""
        self.generation: dict[str, dict[str, Any]] = {}
        """By task, the settings that reached `generate`."""
        self.condition_digests: list[str] = list(settings.get("condition_digests", []))
        self.decided: dict[str, list[list[int]]] = {}
        """By task, for each steering with a condition: on how many prompts it acted, of how many."""

    def add(self, requests: list[Instance], task_dict: Mapping[str, Any]) -> None:
        """Keep requests, whether answered or found in a cache; padding of a rank is left out."""
        self._task_dict = task_dict
        for request in requests:
            if not (request.metadata or {}).get("__padding_only__"):
                self._requests[id(request)] = request

    def add_error(self, where: Document | None, error: Exception) -> None:
        """Keep an error with its task and document."""
        task, doc_id = where or (None, None)
        self.errors.append({"task": task, "doc_id": doc_id, "error": f"{type(error).__name__}: {error}"})

    def write(self, folder: Path, wrapper: str, results: str | None = None) -> Path:
        """Write `hones_manifest_<pid>_<time>_rank<k>.json` into the folder of a run's results.

        `wrapper` is the name after --model, `results` the name of the results file, which only the first rank
        of a run that succeeded has. A failed run has no hashes, as it may not be able to load its images.
        """
        now = datetime.now(UTC)
        name = f"hones_manifest_{os.getpid()}_{now:%Y%m%dT%H%M%S%f}_rank{self.rank}.json"
        path = folder / name
        write_json(path, self._content(wrapper, results) | {"created": now.isoformat()})
        return path

    def _content(self, wrapper: str, results: str | None) -> dict[str, Any]:
        return {
            "format": "hones-eval run manifest",
            "format_version": MANIFEST_VERSION,
            "package_version": __version__,
            "lmms_eval_version": version("lmms-eval"),
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            "base_model": self._base_model,
            "wrapper": wrapper,
            "base_wrapper": self.base_wrapper,
            "steering": self._steering(),
            "requests": {} if self.errors else self._fingerprints(),
            "until": self.until,
            "generation": self.generation,
            "errors": self.errors,
            "results": results,
            "rank": self.rank,
        }

    def _steering(self) -> dict[str, Any] | None:
        if self.steering is None:
            return None
        return {
            "path": str(self._settings["path"]),
            "digest": self.steering.digest,
            "strength": self._settings["strength"],
            "attach": self._settings["attach"],
            "scope": self._settings["scope"],
            **self._condition(),
            "provenance": {
                **self.steering.counts,
                **self.steering.provenance.to_json(),
            },
        }

    def _condition(self) -> dict[str, Any]:
        """The condition, and on how many prompts of each task it held; nothing for a steering without one."""
        if not self.condition_digests:
            return {}
        return {
            "condition": self._settings["condition"],
            "condition_digests": self.condition_digests,
            "acted": self.decided,
        }

    def _fingerprints(self) -> dict[str, dict[str, Any]]:
        """By task and document, a hash of all its prompts, and one hash per image."""
        prompts: dict[Document, list[str]] = {}
        images: dict[Document, list[str]] = {}
        requests = self._requests.values()
        for request in tqdm(requests, desc="Hashing prompts and images", disable=self.rank != 0):
            document = (str(request.task_name), request.doc_id)
            if request.request_type == "loglikelihood" and document in prompts:
                prompts[document] += _texts(request)  # another choice of the same question
                continue
            texts, shown = _shown(request, self._task_dict)
            prompts.setdefault(document, []).extend(texts)
            images.setdefault(document, []).extend(image_hash(image) for image in shown)
        tasks: dict[str, dict[str, Any]] = {}
        for (task, doc_id), texts in prompts.items():
            tasks.setdefault(task, {})[str(doc_id)] = {
                "prompt_sha256": hash_of(texts),
                "image_sha256": images[task, doc_id],
            }
        return tasks


def _shown(request: Instance, task_dict: Mapping[str, Any]) -> tuple[list[str], list[Image]]:
    """The texts and images of one request, from the same functions that the wrapper calls."""
    arguments, texts = with_context(request).args, _texts(request)
    sources = [part for part in arguments if callable(part)]
    if not sources:
        return texts, []
    doc_id, task, split = arguments[-3:]
    # A log-likelihood request has doc_to_target before doc_to_visual; others may have doc_to_text after it.
    source = sources[0] if request.request_type in MAKES_INPUT else sources[-1]
    content = source(task_dict[task][split][doc_id])
    if isinstance(content, list) and content and isinstance(content[0], dict) and "role" in content[0]:
        return list(_message_texts(content)), [part for part in _leaves(content) if isinstance(part, Image)]
    return texts, [part for part in _leaves(content) if isinstance(part, Image)]


def _texts(request: Instance) -> list[str]:
    """The question, and in a log-likelihood request also the choice."""
    count = 2 if request.request_type == "loglikelihood" else 1
    return [part for part in request.args[:count] if isinstance(part, str)]


def _message_texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        yield str(message["role"])
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            yield str(part["text"]) if part["type"] == "text" else f"<{part['type']}>"


def _leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for part in content:
            yield from _leaves(part)
    else:
        yield content
