"""Attribution patching: first-order estimates of the effect of removing every head and neuron.

For an objective `f` of an example's gold answer, an activation `z` at a site and its gradient `g = df/dz`,
removing the site changes `f` by about `sum_t g_t . (r_t - z_t)`. The sum is over token positions, and `r` is
what replaces the site: zero for a neuron, the head edit's replacement for a head. One forward and one
backward pass give the estimate for all sites of all layers (Nanda, "Attribution Patching", 2023; Syed et al.,
"Attribution Patching Outperforms Automated Circuit Discovery", 2023).

Importance is the mean over examples of the absolute estimate. To first order the same site helps on one
example and hurts on the next, and signed means cancel. The signed mean is kept as the direction.

Integrated gradients replace `g` by its average along the straight line from `r` to `z`. That takes one pass
per layer, kind of site and step, because the line changes one layer's activations at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hones_eval.choices import Absolute, Estimate, Objective
from hones_eval.core import readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import Site, input_of
from hones_eval.engine.passes import present
from hones_eval.errors import HonesError, TaskError, first_line
from hones_eval.lmms.answers.margin import Margin
from hones_eval.lmms.examples import Example
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.runs.measure import Measurement, Totals

Append = Callable[[Mapping[str, Any], Mapping[str, Any], list[int]], dict[str, Any]]
"""Appends answer tokens to the inputs of a prompt with these generation settings: `Decoder.append_answer`."""
Kind = Literal["heads", "neurons"]
WAY_OUT = "use a method without gradients (hones, vseam, activation), or load the model so that it has them"


@dataclass(frozen=True)
class AttributionSettings:
    """How effects are estimated."""

    estimate: Estimate = "first_order"
    """One gradient at the activations (`first_order`), or integrated gradients (`ig`)."""
    objective: Objective = "margin"
    """The objective `f`: the log-probability of the gold answer's tokens, or the sum of their logits' margins
    over the largest other logit, which does not saturate where the model is certain. Answers that are margins
    between two words have that margin."""
    absolute: Absolute = "position"
    """Whether absolute values are taken of each example's sum over positions, or of each position."""
    steps: int = 4
    """Points on the line of integrated gradients, at the midpoints of equal parts."""

    def __post_init__(self) -> None:
        """Raise HonesError for fewer than one step."""
        if self.steps < 1:
            raise HonesError(f"integrated gradients need at least 1 step, not {self.steps}")


SCREEN = AttributionSettings("first_order", "margin", "example")
"""The estimate by which heads are screened before they are measured."""


class Attribution:
    """One pass of attribution patching. Only activations get gradients; weights are frozen."""

    def __init__(
        self,
        anatomy: Anatomy,
        append: Append,
        replacement: HeadReplacement | None = None,
        settings: AttributionSettings = SCREEN,
        kinds: Sequence[Kind] = ("heads",),
    ) -> None:
        """Estimate for all heads, all neurons, or both.

        Args:
            anatomy: of the model.
            append: appends answer tokens to an example's prompt.
            replacement: how a head is removed; by default by the mean of the other heads.
            settings: the estimate, the objective and where absolute values are taken.
            kinds: the kinds of sites.
        """
        self.anatomy, self.append, self.settings, self.kinds = anatomy, append, settings, tuple(kinds)
        self.replacement = replacement or HeadReplacement.by_mean(anatomy)
        self.sites = {"heads": anatomy.heads_in, "neurons": anatomy.neurons_in}

    def zeros(self) -> dict[str, Tensor]:
        """Per kind the sums of absolute and of signed estimates ([L, H] or [L, I]), and the example count."""
        shape = self.anatomy.shape
        widths = {"heads": shape.heads, "neurons": shape.neurons}
        names = [(name, widths[kind]) for kind in self.kinds for name in (kind, f"{kind}_signed")]
        sums = {name: torch.zeros(shape.layers, width, dtype=torch.float64) for name, width in names}
        return sums | {"examples": torch.zeros((), dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        """Estimate the drop of the objective when each site is removed, on one example.

        Raises: TaskError for an answer without tokens; HonesError when the model gives no gradients, or
            gradients that are not finite.
        """
        if not example.target_ids:
            raise TaskError(f"{example.where}: its gold answer {example.target!r} has no tokens")
        self.replacement.prepare(example)
        # Loops run in inference mode, whose tensors cannot get gradients; copies made outside of it can.
        with torch.inference_mode(False), torch.enable_grad(), _frozen(self.anatomy.model):
            sums = self.zeros()
            sums["examples"] += 1
            inputs = _copied(self.append(example.inputs, example.settings, example.target_ids[:-1]))
            estimated = self._first_order if self.settings.estimate == "first_order" else self._integrated
            for kind, layers in estimated(example, inputs).items():
                for layer, found in layers.items():
                    absolute, signed = self._drops(example, kind, layer, *found)
                    sums[kind][layer, : len(absolute)] = absolute
                    sums[f"{kind}_signed"][layer, : len(signed)] = signed
        return Measurement(sums)

    @staticmethod
    def scores(totals: Totals, kind: Kind = "heads", signed: bool = False) -> Tensor:
        """Mean absolute estimate, or mean signed estimate, per site: [L, H] or [L, I]."""
        return (totals.sums[f"{kind}_signed" if signed else kind] / totals.sums["examples"]).float()

    def _first_order(
        self, example: Example, inputs: Mapping[str, Any]
    ) -> dict[Kind, dict[int, tuple[Tensor, Tensor]]]:
        """Per kind and layer, the activations of a site [1, tokens, width] and their gradient."""
        sites = present([site for kind in self.kinds for site in self.sites[kind]])
        with _graph_from(sites) as kept:
            value = self._value(example, inputs)
        found = [kept[site.name] for site in sites]
        gradients = _gradients(value, found, example)
        pairs = iter(zip(found, gradients, strict=True))
        return {
            kind: {layer: next(pairs) for layer, site in enumerate(self.sites[kind]) if site.width}
            for kind in self.kinds
        }

    def _integrated(
        self, example: Example, inputs: Mapping[str, Any]
    ) -> dict[Kind, dict[int, tuple[Tensor, Tensor]]]:
        """The same with each gradient averaged over the line from the replacement to the activations."""
        sites = present([site for kind in self.kinds for site in self.sites[kind]])
        with _graph_from(sites) as kept, torch.no_grad():
            self._value(example, inputs)
        steps = self.settings.steps
        result: dict[Kind, dict[int, tuple[Tensor, Tensor]]] = {}
        for kind in self.kinds:
            result[kind] = {}
            for layer, site in enumerate(self.sites[kind]):
                if not site.width:
                    continue
                x = kept[site.name].detach()
                removed = self._removed(kind, layer, x)
                total = torch.zeros_like(x)
                for step in range(steps):
                    point = removed + (step + 0.5) / steps * (x - removed)
                    with _graph_from([site], {site.name: point}) as at:
                        value = self._value(example, inputs)
                    total += _gradients(value, [at[site.name]], example)[0]
                result[kind][layer] = (x, total / steps)
        return result

    def _value(self, example: Example, inputs: Mapping[str, Any]) -> Tensor:
        """The objective of one example, a scalar."""
        logits = self.anatomy.model(**inputs, use_cache=False).logits
        ids = torch.tensor(example.target_ids, device=logits.device)
        read = logits[:, -len(ids) :]
        if self.settings.objective == "log_probability":
            return readouts.sequence_log_probability(read, ids)[0]
        if isinstance(example.details, Margin):
            sign = 1 if example.target_ids[0] == example.details.yes else -1
            return sign * example.details.of(read[0, 0])
        return readouts.target_margin(read[0], ids)

    def _removed(self, kind: Kind, layer: int, x: Tensor) -> Tensor:
        """The activations of a layer [1, tokens, width] with every site removed, each as if alone."""
        if kind == "neurons":
            return torch.zeros_like(x)
        split = x.unflatten(-1, (self.anatomy.shape.heads_of(layer), -1))
        return self.replacement.replacement(layer, split).flatten(-2)

    def _drops(
        self, example: Example, kind: Kind, layer: int, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Absolute and signed estimates of the drop per site of one layer [sites], float64."""
        if not bool(torch.isfinite(gradient).all()):
            raise HonesError(
                f"{example.where}: the gradient at the {kind} of layer {layer} is not finite; run with "
                f"--dtype float32 or bfloat16, or {WAY_OUT}"
            )
        x, gradient = x.detach().float(), gradient.float()
        by_feature = gradient * (x - self._removed(kind, layer, x))
        if kind == "heads":
            by_site = by_feature.unflatten(-1, (self.anatomy.shape.heads_of(layer), -1)).sum(-1)
        else:
            by_site = by_feature
        signed = by_site.sum((0, 1))
        absolute = signed.abs() if self.settings.absolute == "example" else by_site.abs().sum((0, 1))
        return absolute.double().cpu(), signed.double().cpu()


def _gradients(value: Tensor, of: Sequence[Tensor], example: Example) -> tuple[Tensor, ...]:
    """The gradients of a scalar. Raises: HonesError for a model that has none."""
    try:
        return torch.autograd.grad(value, list(of))
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise HonesError(
                f"{example.where}: the backward pass does not fit into the device's memory; use shorter "
                f"prompts or smaller images, or {WAY_OUT}"
            ) from error
        raise HonesError(
            f"{example.where}: the model gives no gradients ({first_line(error)}); {WAY_OUT}"
        ) from error


def _copied(value: Any) -> Any:
    """A value with copies of all its tensors."""
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of weights during the block."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trainable:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)


@contextmanager
def _graph_from(
    sites: Sequence[Site], instead: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of sites with their position in the graph, which starts at the first of them.

    Weights are frozen, so nothing before the first site needs a gradient: its input becomes a leaf, and the
    inputs of all later sites depend on it. `instead` replaces the inputs of sites by name.
    """
    kept: dict[str, Tensor] = {}
    given = instead or {}

    def record(site: Site) -> Callable[..., Tensor]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            x = given.get(site.name, input_of(site, args))
            kept[site.name] = x if x.requires_grad else x.detach().requires_grad_(True)
            return kept[site.name]

        return keep

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(record(site)).remove)
        yield kept
