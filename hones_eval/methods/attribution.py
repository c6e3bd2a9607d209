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

In a mixture of experts only the activations of routed tokens are recorded and get gradients. The neurons of
an expert that no token of an example is routed to are not measured on that example.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hones_eval.choices import Absolute, Estimate, Objective
from hones_eval.core import readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.experts import NeuronTap, Routed
from hones_eval.core.hooks import Site, input_of, uncompiled
from hones_eval.core.scope import ScopeTracker, answer_follows
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
        tracker: ScopeTracker | None = None,
    ) -> None:
        """Estimate for all heads, all neurons, or both.

        Args:
            anatomy: of the model.
            append: appends answer tokens to an example's prompt.
            replacement: how a head is removed; by default by the mean of the other heads.
            settings: the estimate, the objective and where absolute values are taken.
            kinds: the kinds of sites.
            tracker: knows the tokens at which sites are removed; by default all.
        """
        self.anatomy, self.append, self.settings, self.kinds = anatomy, append, settings, tuple(kinds)
        self.tracker = tracker
        self.replacement = replacement or HeadReplacement.by_mean(anatomy)
        self.sites = {"heads": anatomy.heads_in, "neurons": anatomy.neurons_in}

    def zeros(self) -> dict[str, Tensor]:
        """Per kind the sums of absolute and of signed estimates ([L, H] or [L, I]), and the example count."""
        shape = self.anatomy.shape
        widths = {"heads": shape.heads, "neurons": shape.neurons}
        names = [(name, widths[kind]) for kind in self.kinds for name in (kind, f"{kind}_signed")]
        if "neurons" in self.kinds and shape.has_experts:
            names.append(("routed", shape.neurons))
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
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _frozen(self.anatomy.model),
            ExitStack() as stack,
        ):
            if self.tracker is not None:
                stack.callback(self.tracker.attach().detach)
                stack.enter_context(answer_follows(self.anatomy.model, len(example.target_ids) - 1))
            sums = self.zeros()
            sums["examples"] += 1
            inputs = _copied(self.append(example.inputs, example.settings, example.target_ids[:-1]))
            estimated = self._first_order if self.settings.estimate == "first_order" else self._integrated
            for (kind, layer), pieces in estimated(example, inputs).items():
                for piece in pieces:
                    self._add(sums, kind, layer, piece, self._drops(example, kind, layer, piece))
        return Measurement(sums)

    @staticmethod
    def scores(totals: Totals, kind: Kind = "heads", signed: bool = False) -> Tensor:
        """Mean absolute estimate, or mean signed estimate, per site: [L, H] or [L, I]."""
        return (totals.sums[f"{kind}_signed" if signed else kind] / totals.sums["examples"]).float()

    def _layers(self, kind: Kind) -> list[int]:
        """The layers that have sites of a kind. A short convolution has no heads."""
        shape = self.anatomy.shape
        count = shape.heads_of if kind == "heads" else shape.neurons_of
        return [layer for layer, site in enumerate(self.sites[kind]) if site.width and count(layer)]

    def _first_order(self, example: Example, inputs: Mapping[str, Any]) -> "Pieces":
        """The activations of every site, with their gradients, by kind and layer."""
        places = [(kind, layer) for kind in self.kinds for layer in self._layers(kind)]
        with _graph_from([self.sites[kind][layer] for kind, layer in places], self.tracker) as kept:
            value = self._value(example, inputs)
        found = {place: kept[self.sites[place[0]][place[1]].name] for place in places}
        pieces = [piece for of_site in found.values() for piece in of_site]
        gradients = iter(_gradients(value, [piece.x for piece in pieces], example))
        return {
            place: [piece._replace(gradient=next(gradients)) for piece in of_site]
            for place, of_site in found.items()
        }

    def _integrated(self, example: Example, inputs: Mapping[str, Any]) -> "Pieces":
        """The same with each gradient averaged over the line from the replacement to the activations."""
        places = [(kind, layer) for kind in self.kinds for layer in self._layers(kind)]
        with (
            _graph_from([self.sites[kind][layer] for kind, layer in places], self.tracker) as kept,
            torch.no_grad(),
        ):
            self._value(example, inputs)
        steps = self.settings.steps
        result: Pieces = {}
        for kind, layer in places:
            site = self.sites[kind][layer]
            pieces = [piece._replace(x=piece.x.detach()) for piece in kept[site.name]]
            removed = [self._removed(kind, layer, piece.x, piece.acting) for piece in pieces]
            totals = [torch.zeros_like(piece.x) for piece in pieces]
            for step in range(steps):
                share = (step + 0.5) / steps
                points = [r + share * (piece.x - r) for r, piece in zip(removed, pieces, strict=True)]
                with _graph_from([site], self.tracker, {site.name: points}) as at:
                    value = self._value(example, inputs)
                found = _gradients(value, [piece.x for piece in at[site.name]], example)
                totals = [total + one for total, one in zip(totals, found, strict=True)]
            result[kind, layer] = [
                piece._replace(gradient=total / steps) for piece, total in zip(pieces, totals, strict=True)
            ]
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

    def _removed(self, kind: Kind, layer: int, x: Tensor, acting: Tensor | bool) -> Tensor:
        """The activations of a layer with every site removed, each as if alone, at the tokens in the scope.

        `x` is [1, tokens, width] or [pairs, width], and `acting` says which tokens or pairs are in the scope.
        """
        if acting is False:
            return x
        if kind == "neurons":
            removed = torch.zeros_like(x)
        else:
            split = x.unflatten(-1, (self.anatomy.shape.heads_of(layer), -1))
            removed = self.replacement.replacement(layer, split).flatten(-2)
        return removed if acting is True else torch.where(acting.to(x.device)[..., None], removed, x)

    def _drops(self, example: Example, kind: Kind, layer: int, piece: "_Piece") -> Tensor:
        """Estimates of the drop per token and site of one layer: [1, tokens, sites] or [pairs, width]."""
        assert piece.gradient is not None
        if not bool(torch.isfinite(piece.gradient).all()):
            raise HonesError(
                f"{example.where}: the gradient at the {kind} of layer {layer} is not finite; run with "
                f"--dtype float32 or bfloat16, or {WAY_OUT}"
            )
        x, gradient = piece.x.detach().float(), piece.gradient.float()
        drops = gradient * (x - self._removed(kind, layer, x, piece.acting))
        if kind == "heads":
            drops = drops.unflatten(-1, (self.anatomy.shape.heads_of(layer), -1)).sum(-1)
        return drops

    def _add(
        self, sums: Mapping[str, Tensor], kind: Kind, layer: int, piece: "_Piece", drops: Tensor
    ) -> None:
        """Add one layer's estimates to the sums of its sites."""
        signed = piece.by_site(drops)
        absolute = signed.abs() if self.settings.absolute == "example" else piece.by_site(drops.abs())
        start = piece.part.start if piece.part is not None else 0
        here = slice(start, start + len(signed))
        sums[kind][layer, here] += absolute.cpu()
        sums[f"{kind}_signed"][layer, here] += signed.cpu()
        if kind == "neurons" and "routed" in sums:
            acting = torch.as_tensor(piece.acting, device=drops.device)
            inside = torch.ones_like(drops) * (acting[..., None] if acting.ndim else acting)
            sums["routed"][layer, here] += (piece.by_site(inside) > 0).cpu()


class _Piece(NamedTuple):
    """Activations of a site with their gradient. Those of experts come in several pieces, by their part."""

    x: Tensor
    """[1, tokens, width], or [pairs, width] of routed tokens."""
    part: Routed | None = None
    acting: Tensor | bool = True
    """Whether the tokens, or pairs, are in the scope: one value for each or for all."""
    gradient: Tensor | None = None

    def by_site(self, values: Tensor) -> Tensor:
        """Sums over tokens of [1, tokens, sites] or [pairs, width], one per site, float64."""
        if self.part is None:
            return values.sum((0, 1)).double()
        sums = values.new_zeros(self.part.expert_count, values.shape[-1], dtype=torch.float64)
        return sums.index_add(0, self.part.experts, values.double()).flatten()


Pieces = dict[tuple[Kind, int], list[_Piece]]
"""The activations of sites by kind and layer."""


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
    sites: Sequence[Site],
    tracker: ScopeTracker | None = None,
    instead: Mapping[str, Sequence[Tensor]] | None = None,
) -> Iterator[dict[str, list[_Piece]]]:
    """Record the inputs of sites with their position in the graph, which starts at the first of them.

    Weights are frozen, so nothing before the first site needs a gradient: its input becomes a leaf, and the
    inputs of all later sites depend on it. `instead` replaces the inputs of sites by name, piece by piece.
    """
    kept: dict[str, list[_Piece]] = {}
    given = {name: iter(points) for name, points in (instead or {}).items()}

    def keep(site: Site, x: Tensor, part: Routed | None = None) -> Tensor:
        x = next(given[site.name]) if site.name in given else x
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        acting = True if tracker is None else tracker.acting
        if isinstance(acting, Tensor) and part is not None:
            acting = acting.to(x.device)[part.rows, part.positions]
        kept.setdefault(site.name, []).append(_Piece(x, part, acting))
        return x

    def register(site: Site) -> Any:
        if isinstance(site.module, NeuronTap):
            # Without routed tokens there is nothing that the objective could depend on.
            return site.module.register_routed_hook(
                lambda part: keep(site, part.values, part) if len(part.values) else None
            )
        return site.module.register_forward_pre_hook(lambda module, args: keep(site, input_of(site, args)))

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for site in sites:
            stack.callback(register(site).remove)
        yield kept
