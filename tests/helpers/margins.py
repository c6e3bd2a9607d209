"""The reference of retrieval by margins: one full forward a candidate, with hooks of its own."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import plain
import torch
from torch import Tensor, nn

from hones_eval.api import model as loading
from hones_eval.core.sites import Neuron
from hones_eval.lmms.examples import TaskExamples, inner_model


class Slow:
    """Some candidates of a task, and what a plain loop over them says."""

    def __init__(
        self, model: str, arguments: str, task: str, words: tuple[str, str], limit: int, offset: int = 0
    ) -> None:
        """`words` are the tokens that begin Yes and No behind the task's prompt."""
        lmm = loading.load_lmm(model, arguments, dtype=torch.float32)
        self.model = inner_model(lmm).float()
        examples = TaskExamples(lmm, task, model_name=model, limit=limit, offset=offset)
        self.tokens = [examples._tokenizer.convert_tokens_to_ids(word) for word in words]
        self.items = [examples[i] for i in range(len(examples))]
        documents = [examples.document(i) for i in range(len(examples))]
        self.queries = [one["query"] for one in documents]
        self.right = [one.get("positive", one.get("answer") == "Yes") for one in documents]
        assert sum(self.right) == len(set(self.queries))

    def logits(self, edit: plain.Edit | None = None) -> Tensor:
        """Behind every prompt [items, vocabulary]."""
        rows = [plain.forward(self.model, dict(item.inputs), edit).logits[-1] for item in self.items]
        return torch.stack(rows).double()

    def margins(self, logits: Tensor) -> list[float]:
        yes, no = self.tokens
        return (logits[:, yes] - logits[:, no]).tolist()

    def ndcg(self, logits: Tensor) -> float:
        """Sorted by margin, with the right candidate behind its equals."""
        margins, gains = self.margins(logits), []
        for query in sorted(set(self.queries)):
            members = [i for i, one in enumerate(self.queries) if one == query]
            order = sorted(members, key=lambda i: (-margins[i], self.right[i]))
            place = next(place for place, i in enumerate(order) if self.right[i])
            gains.append(1 / math.log2(place + 2) if place < 5 else 0.0)
        return sum(gains) / len(gains)

    def log_probability(self, logits: Tensor) -> float:
        targets = torch.tensor([self.tokens[0] if right else self.tokens[1] for right in self.right])
        return float(logits.log_softmax(-1).gather(1, targets[:, None]).mean())

    def steered(self, bank: Sequence[Neuron], factor: float) -> Tensor:
        """Logits with the neurons of a bank multiplied by one factor."""
        layers = plain.layers(self.model)
        scales = torch.ones(len(layers), layers[0].mlp.down_proj.in_features)
        for site in bank:
            scales[site] = factor
        return self.scaled(scales)

    def scaled(self, scales: Tensor) -> Tensor:
        """Logits with every neuron multiplied by its scale [L, I]."""
        with multiplied(self.model, scales):
            return self.logits()


@contextmanager
def multiplied(model: nn.Module, scales: Tensor) -> Iterator[None]:
    """Every neuron multiplied by its scale [L, I], by hooks written out here."""
    with ExitStack() as hooks:
        for layer, row in zip(plain.layers(model), scales, strict=True):

            def scale(_: nn.Module, args: tuple[Tensor], row: Tensor = row) -> tuple[Tensor]:
                return (args[0] * row,)

            hooks.callback(layer.mlp.down_proj.register_forward_pre_hook(scale).remove)
        yield
