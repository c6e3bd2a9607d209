"""The logit lens: each layer's own answer, and where two models or steerings differ (V-SEAM 2)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.offloading import device_of
from hones_eval.engine.activations import VIEWS, LayerViews
from hones_eval.engine.tokens import positions, token_texts
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.examples import Example
from hones_eval.runs.measure import Measurement

NAMED = ("last", "text", "image", "all")


class Readout(NamedTuple):
    """Readout of hidden states [P, hidden] through final norm and unembedding, softmax in float32.

    `top_ids` and `top_probabilities` [P, k]; `entropy` [P] in nats; `answer` [P], the answer's probability,
    summed over its token ids. Stacked over views and layers they are [views, L, P, ...].
    """

    top_ids: Tensor
    top_probabilities: Tensor
    entropy: Tensor
    answer: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """One example: its chosen positions, the tokens there, and the readout of every view of every layer.

    `other` is the readout of the model compared with. `divergence` is KL(model || other) [views, L, P] in
    nats.
    """

    index: int
    doc_id: int
    answer: str
    positions: list[int]
    tokens: list[str]
    readout: Readout
    other: Readout | None
    divergence: Tensor | None


@dataclass(frozen=True, eq=False)
class Other:
    """The model to compare with: `anatomy` describes it inside the context that `attached` gives."""

    anatomy: Anatomy
    attached: Callable[[], AbstractContextManager[Any]] = nullcontext


class LogitLens:
    """One pass over examples; each record is a `Seen`, and the sums are of the last chosen position."""

    def __init__(
        self,
        anatomy: Anatomy,
        tokenizer: PreTrainedTokenizerBase,
        chosen: str = "last",
        top: int = 10,
        other: Other | None = None,
    ) -> None:
        """Look at `chosen` positions (last, text, image, all, or numbers as in 5,-1) for `top` tokens each.

        Raises: HonesError for other words, and for another model whose layers or tokens do not correspond.
        """
        self.anatomy, self.tokenizer, self.chosen, self.other = anatomy, tokenizer, chosen, other
        self.top = min(top, anatomy.shape.vocabulary)
        if top < 1:
            raise HonesError(f"the lens shows at least one token, not {top}")
        if chosen not in NAMED and _numbers(chosen) is None:
            raise HonesError(f"positions {chosen!r} are neither {', '.join(NAMED)} nor numbers like 5,-1")
        if other is not None:
            _check_comparable(anatomy, other.anatomy)

    def zeros(self) -> dict[str, Tensor]:
        """The number of examples, and sums over them at the last chosen position [views, L]."""
        names = ["answer", "entropy"]
        names += ["other_answer", "other_entropy", "divergence"] if self.other else []
        sums = {
            name: torch.zeros(len(VIEWS), self.anatomy.shape.layers, dtype=torch.float64) for name in names
        }
        return sums | {"examples": torch.zeros((), dtype=torch.float64)}

    @torch.no_grad()
    def measure(self, example: Example) -> Measurement:
        """Look at one example."""
        where = f"{example.task}, doc_id {example.doc_id}"
        if not example.target_ids:
            raise TaskError(f"{where}: its answer {example.target!r} has no tokens")
        ids = list(dict.fromkeys(example.target_ids))
        places = self._places(example, where)
        mine = LayerViews(self.anatomy, example.inputs)
        if not bool(torch.isfinite(mine.base_logits).all()):
            raise HonesError(f"{where}: the model's logits are not finite")
        others = None
        if self.other is not None:
            with self.other.attached():
                others = LayerViews(self.other.anatomy, _for_model(self.other.anatomy, example.inputs))
        readouts, other, divergence = [], [], []
        for view in VIEWS:
            for layer in range(len(self.anatomy.layers)):
                logs = _logs(self.anatomy, mine.view(view, layer)[places])
                readouts.append(self._readout(logs, ids))
                if self.other is not None and others is not None:
                    beside = _logs(self.other.anatomy, others.view(view, layer)[places])
                    other.append(self._readout(beside, ids))
                    divergence.append((logs.exp() * (logs - beside)).sum(-1))
        seen = Seen(
            index=example.index,
            doc_id=example.doc_id,
            answer=example.target,
            positions=places,
            tokens=self._tokens(example, places),
            readout=_stacked(readouts),
            other=_stacked(other) if other else None,
            divergence=torch.stack(divergence).unflatten(0, (len(VIEWS), -1)) if divergence else None,
        )
        return Measurement(_sums(seen), seen)

    def _readout(self, logs: Tensor, ids: Sequence[int]) -> Readout:
        probabilities = logs.exp()
        top = probabilities.topk(self.top, dim=-1)
        entropy = -(probabilities * logs).sum(-1)
        return Readout(top.indices, top.values, entropy, probabilities[:, ids].sum(-1))

    def _places(self, example: Example, where: str) -> list[int]:
        """The chosen positions, none of them padding."""
        image, text = (places.tolist() for places in positions(self.anatomy, example.inputs))
        every = sorted([*image, *text])
        named = {"last": every[-1:], "text": text, "image": image, "all": every}
        if self.chosen in named:
            return named[self.chosen]
        try:
            return [every[index] for index in _numbers(self.chosen) or []]
        except IndexError:
            raise HonesError(
                f"{where}: its prompt has {len(every)} tokens, so not all of the positions {self.chosen}"
            ) from None

    def _tokens(self, example: Example, places: Sequence[int]) -> list[str]:
        text = positions(self.anatomy, example.inputs)[1].tolist()
        ids = example.inputs["input_ids"][0, text].tolist()
        texts = dict(zip(text, token_texts(self.tokenizer, ids), strict=True))
        return [texts.get(place, "<image>") for place in places]


def _logs(anatomy: Anatomy, hidden: Tensor) -> Tensor:
    return torch.log_softmax(anatomy.logits(hidden).float(), -1).cpu()


def _stacked(rows: Sequence[Readout]) -> Readout:
    return Readout(
        *(torch.stack(column).unflatten(0, (len(VIEWS), -1)) for column in zip(*rows, strict=True))
    )


def _sums(seen: Seen) -> dict[str, Tensor]:
    sums = {"answer": seen.readout.answer, "entropy": seen.readout.entropy}
    if seen.other is not None and seen.divergence is not None:
        sums |= {"other_answer": seen.other.answer, "other_entropy": seen.other.entropy}
        sums |= {"divergence": seen.divergence}
    last = {name: values[..., -1].double() for name, values in sums.items()}
    return last | {"examples": torch.ones((), dtype=torch.float64)}


def _for_model(anatomy: Anatomy, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on another model's device and in its type."""
    model, device = anatomy.model, device_of(anatomy.model)
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def _numbers(chosen: str) -> list[int] | None:
    try:
        return [int(part) for part in chosen.split(",")]
    except ValueError:
        return None


def _check_comparable(anatomy: Anatomy, other: Anatomy) -> None:
    mine, theirs = anatomy.shape, other.shape
    if (mine.layers, mine.vocabulary) != (theirs.layers, theirs.vocabulary):
        raise HonesError(
            f"the models cannot be compared layer by layer and token by token: one has {mine.layers} layers "
            f"and {mine.vocabulary} tokens, the other {theirs.layers} and {theirs.vocabulary}"
        )
