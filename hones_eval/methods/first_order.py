"""First-order estimates of what replacing a head does: attribution patching, one backward pass an example."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hones_eval.core import edits, readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import Site, input_of
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.examples import Example
from hones_eval.runs.measure import Measurement, Totals

Append = Callable[[Mapping[str, Any], list[int]], dict[str, Any]]


class FirstOrder:
    """One pass: by how much replacing every head moves the target's margin, to first order.

    `|<gradient of the margin at the input of o_proj, mean of the other heads - head>|`, summed over positions
    and averaged over examples (Nanda, "Attribution Patching", 2023; Syed et al., "Attribution Patching
    Outperforms Automated Circuit Discovery", 2023). The margin is that of the target's logits over the
    largest others: a log-probability has no slope where the model is sure. Sizes, since to first order the
    same head helps in one example and hurts in the next, and both would cancel.
    """

    def __init__(self, anatomy: Anatomy, append: Append) -> None:
        """Estimate for all heads of a model; `append` puts answer tokens behind an example's prompt."""
        self.anatomy, self.append = anatomy, append

    def zeros(self) -> dict[str, Tensor]:
        """Sums of estimated changes [L, H], and the count of examples."""
        shape = self.anatomy.shape
        return {
            "change": torch.zeros(shape.layers, shape.heads, dtype=torch.float64),
            "examples": torch.zeros((), dtype=torch.float64),
        }

    def measure(self, example: Example) -> Measurement:
        """One forward and one backward pass over prompt and target."""
        if not example.target_ids:
            raise TaskError(
                f"{example.task}, doc_id {example.doc_id}: its target {example.target!r} has no tokens"
            )
        change = self._change(self.append(example.inputs, example.target_ids[:-1]), example.target_ids)
        if not bool(torch.isfinite(change).all()):
            raise HonesError(
                f"{example.task}, doc_id {example.doc_id}: the gradient at the heads is not finite; "
                "run in float32 or bfloat16 with --dtype, or without --screen"
            )
        return Measurement({"change": change.abs(), "examples": torch.ones((), dtype=torch.float64)})

    @staticmethod
    def scores(totals: Totals) -> Tensor:
        """Mean size of the estimated change [L, H]."""
        return (totals.sums["change"] / totals.sums["examples"]).float()

    def _change(self, inputs: Mapping[str, Any], target_ids: list[int]) -> Tensor:
        # Loops run without gradients, and on tensors that cannot have any; copies can.
        with torch.inference_mode(False), torch.enable_grad(), _frozen(self.anatomy.model):
            sites = [site for site in self.anatomy.heads_in if site.width]
            with _leaves(sites) as heads:
                logits = self.anatomy.model(**_copied(inputs), use_cache=False).logits
            target = torch.tensor(target_ids, device=logits.device)
            value = readouts.target_margin(logits[0, -len(target) :], target)
            layers = [heads[site.name] for site in sites]
            gradients = torch.autograd.grad(value, layers)
        changes = torch.zeros(self.anatomy.shape.layers, self.anatomy.shape.heads, dtype=torch.float64)
        there = [layer for layer, site in enumerate(self.anatomy.heads_in) if site.width]
        for layer, x, g in zip(there, layers, gradients, strict=True):
            count = self.anatomy.shape.heads_of(layer)
            if count:
                changes[layer, :count] = self._of_layer(x, g, count)
        return changes

    @staticmethod
    def _of_layer(x: Tensor, gradient: Tensor, count: int) -> Tensor:
        x, gradient = (one.detach().float().unflatten(-1, (count, -1)) for one in (x, gradient))
        return (gradient * (edits.mean_of_others(x) - x)).sum((0, 1, 3)).double().cpu()


def _copied(value: Any) -> Any:
    """Copies of all tensors in a value."""
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(one) for one in value)
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of any weight is asked for, in the block."""
    learning = [one for one in model.parameters() if one.requires_grad]
    for one in learning:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in learning:
            one.requires_grad_(True)


@contextmanager
def _leaves(sites: list[Site]) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of modules with their place in the graph, which starts at the first of them."""
    kept: dict[str, Tensor] = {}

    def record(site: Site) -> Callable[..., Tensor]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            x = input_of(site, args)
            kept[site.name] = x if x.requires_grad else x.detach().requires_grad_(True)
            return kept[site.name]

        return keep

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(record(site)).remove)
        yield kept
