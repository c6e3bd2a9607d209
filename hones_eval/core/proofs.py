"""Proofs about a model that an earlier run made, kept in the user's cache folder.

Before anything relies on a fast way of computing, an experiment shows on the first example that it is exact
for this model. The outcome depends on the content of the model's weights and on the code that runs it. So it
is kept under a hash of both, and later runs on the same model need not pay for it again. A model whose
checkpoint was replaced, other code of this package, another version of a library, and another device have
another hash.

Only proofs of large models are kept (see `weights.KEPT_BYTES`), and none of models whose modules have hooks
or functions of their own, which the weights do not show.
"""

import functools
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hones_eval.core import weights
from hones_eval.core.hooks import has_own_forward
from hones_eval.core.kept import KeptResults

LIBRARIES = ("torch", "transformers")
PACKAGE = Path(__file__).resolve().parents[1]
OWN_CODE = ("core", "engine")
"""The folders of this package whose code makes and uses proofs."""
KEPT = KeptResults("proofs.json")
cache_file = KEPT.path


class Proofs:
    """The kept proofs of one model as it is now; models that are changed later need a new object."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Of a model as it runs, without edits."""
        self._model = model
        self._identity: list[str] | None = None

    def find(self, what: str, of: Sequence[str]) -> Any | None:
        """The outcome of a proof, as it was given to `keep`; None where it is not known.

        Args:
            what: names the proof.
            of: whatever the proof depends on besides the model.
        """
        key = self._key(what, of)
        return None if key is None else KEPT.get(key)

    def keep(self, what: str, of: Sequence[str], outcome: Any) -> None:
        """Keep the outcome of a proof, as plain JSON. Without a writable cache folder it is made again."""
        if (key := self._key(what, of)) is not None:
            KEPT.keep(key, outcome)

    def _key(self, what: str, of: Sequence[str]) -> str | None:
        if not _is_plain(self._model):
            return None
        if self._identity is None:
            self._identity = _identity(self._model)
        return hashlib.sha256(json.dumps([*self._identity, what, *of]).encode()).hexdigest()


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether a model is large, and runs nothing but its classes' code."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return size >= weights.KEPT_BYTES and not any(map(_is_altered, model.modules()))


def _is_altered(module: nn.Module) -> bool:
    """Whether a module has a `forward` or hooks of its own, those aside by which transformers records."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return has_own_forward(module) or not all(_records_only(hook) for hook in hooks)


def _records_only(hook: object) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _identity(model: PreTrainedModel) -> list[str]:
    """The weights, the model's code and settings, the libraries and the device."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    kind = type(model)
    return [
        weights.weights_digest(model),
        f"{kind.__module__}.{kind.__qualname__}",
        model.config.to_json_string(use_diff=False),
        str(getattr(model.config, "_attn_implementation", "")),
        f"{device.type} {name}",
        *(f"{library} {version(library)}" for library in LIBRARIES),
        own_code_digest(),
    ]


@functools.cache
def own_code_digest() -> str:
    """The hash of this package's code that makes and uses proofs: any change of it asks for new ones."""
    paths = sorted(path for folder in OWN_CODE for path in (PACKAGE / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()
