"""The direction that tells the prompts of two tasks apart, by layer, at the last token of the prompt."""

from typing import NamedTuple

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import hash_of
from hones_eval.engine.activations import inputs_of
from hones_eval.lmms.examples import Example
from hones_eval.runs.measure import Measurement


def is_held_out(example: Example) -> bool:
    """Whether an example is tested on. Half of all images are, in every task; the first image decides."""
    return int(hash_of(example.content[:1]), 16) % 2 == 1


class LastTokens:
    """Reads the residual stream [L, hidden] at the input of each layer, at the last token of a prompt."""

    def __init__(self, anatomy: Anatomy) -> None:
        """Raise HonesError for a model without one residual stream, or whose prompts an encoder reads."""
        if not anatomy.one_stream:
            anatomy.check_plain_streams()
        self.anatomy = anatomy

    @torch.no_grad()
    def of(self, example: Example) -> Tensor:
        """The residual stream of one prompt, float64."""
        with inputs_of(self.anatomy.layers) as kept:
            self.anatomy.model(**example.inputs, use_cache=False)
        return torch.stack([kept[i][0, -1].double().cpu() for i in range(len(self.anatomy.layers))])


class PromptMeans:
    """One pass: the sum of the residual streams of the examples that are not held out."""

    def __init__(self, anatomy: Anatomy) -> None:
        """Read the model of an anatomy."""
        self.read = LastTokens(anatomy)

    def zeros(self) -> dict[str, Tensor]:
        """The sum [L, hidden], and the count of examples."""
        shape = self.read.anatomy.shape
        size = (shape.layers, shape.hidden)
        return {"stream": torch.zeros(size, dtype=torch.float64), "examples": torch.zeros(()).double()}

    def measure(self, example: Example) -> Measurement:
        """One example's residual stream; nothing for one that is held out."""
        if is_held_out(example):
            return Measurement(self.zeros())
        return Measurement({"stream": self.read.of(example), "examples": torch.ones(()).double()})


class Projections:
    """One pass: the products of every example's residual streams with the direction of each layer."""

    def __init__(self, anatomy: Anatomy, directions: Tensor) -> None:
        """Project on `directions` [L, hidden]."""
        self.read, self.directions = LastTokens(anatomy), directions.double()

    def zeros(self) -> dict[str, Tensor]:
        """The count of examples."""
        return {"examples": torch.zeros(()).double()}

    def measure(self, example: Example) -> Measurement:
        """One example: whether it is held out, and its products [L]."""
        products = (self.read.of(example) * self.directions).sum(1).tolist()
        return Measurement({"examples": torch.ones(()).double()}, [is_held_out(example), products])


class Cut(NamedTuple):
    """A threshold, the mean of the shares of both sides that it puts right, and how far it is from values.

    `margin` is the gap around the threshold as a share of the range of all values.
    """

    threshold: float
    balanced: float
    margin: float


def best_cut(wanted: Tensor, others: Tensor) -> Cut:
    """The threshold with the highest balanced accuracy for `wanted > threshold >= others`.

    Among equally good thresholds it is the middle of the widest gap between two values.
    """
    values = torch.cat([wanted, others]).unique()
    cuts = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2])
    gaps = torch.cat([torch.zeros(1, dtype=values.dtype), values[1:] - values[:-1]])
    right = (wanted[None] > cuts[:, None]).double().mean(1)
    wrong = (others[None] > cuts[:, None]).double().mean(1)
    balanced = (right + 1 - wrong) / 2
    best = balanced == balanced.max()
    place = int(torch.where(best, gaps, torch.full_like(gaps, -1.0)).argmax())
    width = float(values[-1] - values[0])
    return Cut(float(cuts[place]), float(balanced[place]), float(gaps[place]) / width if width else 0.0)
