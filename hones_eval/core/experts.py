"""Neurons of mixtures of experts, as the input of one linear layer would present them.

In a mixture of experts a neuron is (layer, expert, i). The neurons of a layer are numbered in one row: those
of expert 0, then those of expert 1, and so on, and last those of shared experts or of a dense FFN beside
them.

transformers stores the routed experts as stacked weights and computes them inside one module, so there is no
linear layer whose input holds all their neurons. `NeuronTap` takes that role. While a hook is on it, it
replaces the experts' forward by an equivalent one that shows its activations to the hooks in between. Without
hooks the model runs its own code. `experts_forward` is compared with the model's own experts before anything
relies on it.

There are two kinds of hooks. A hook on `Routed` activations receives those of routed tokens alone: a row for
each token and expert that it is routed to. Memory and time then grow with the routed tokens, and not with the
number of experts; recording, masking and scaling work this way. A plain forward pre-hook receives the tensor
[rows, tokens, neurons] that a linear layer would read, with zeros where a token is not routed. It is as large
as all experts together, for edits that know nothing of routing.

The activation of a routed neuron is shown multiplied by its routing weight: this is what its down projection
reads from it, so masking and scaling act as they do in a dense FFN, and what a neuron writes is its
activation times its column of the down projection. It is 0 for tokens that were not routed to the expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from hones_eval.core.offloading import in_memory
from hones_eval.errors import EditError


class Routed(NamedTuple):
    """Activations of routed tokens: of each token those of every expert that it is routed to.

    Of a linear layer beside the experts they are those of all tokens, with one expert.
    """

    values: Tensor
    """[pairs, width]: a pair is a token and an expert; `width` is the number of neurons of one expert."""
    rows: Tensor
    """The row of the batch of each pair [pairs]."""
    positions: Tensor
    """The position of each pair's token in its row [pairs]."""
    experts: Tensor
    """The number of each pair's expert among those of this part [pairs]."""
    start: int
    """The number of the first neuron of this part in the layer."""
    expert_count: int
    """The number of experts of this part."""
    size: tuple[int, int]
    """The numbers of rows and of tokens per row."""
    call: object
    """The same object for all parts of one call of the layer."""

    def of_pairs(self, by_neuron: Tensor) -> Tensor:
        """One number per neuron of the layer, [neurons] or [rows, neurons], as one per activation."""
        width = self.values.shape[-1]
        own = by_neuron[..., self.start : self.start + self.expert_count * width].to(self.values.device)
        split = own.unflatten(-1, (self.expert_count, width))
        found: Tensor = split[self.experts] if split.ndim == 2 else split[self.rows, self.experts]
        return found


Show = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Shows activations [pairs, width] with the token and the expert of each pair [pairs] to hooks, and returns
them as the hooks have edited them."""
RoutedHook = Callable[[Routed], Tensor | None]
"""Returns edited activations [pairs, width], or None to leave them."""


class NeuronPart(NamedTuple):
    """Some neurons of a layer: those of stacked experts (`experts` > 0), or those of one linear layer."""

    name: str
    module: nn.Module
    start: int
    width: int
    experts: int = 0

    @property
    def expert_width(self) -> int:
        """The number of neurons of one expert."""
        return self.width // max(1, self.experts)

    def down_weight(self) -> Tensor:
        """What each neuron writes, [hidden, width]."""
        weight = in_memory(self.module, lambda part: part.down_proj if self.experts else part.weight)
        if not self.experts:
            return weight
        if not is_transposed(self.module):
            weight = weight.transpose(1, 2)  # [experts, width, hidden]
        return weight.flatten(0, 1).T


# A linear layer per expert, whose weight is that expert's part of the stacked weights.
_WRITERS: "WeakKeyDictionary[nn.Module, list[nn.Linear]]" = WeakKeyDictionary()


def writers(module: nn.Module) -> list[nn.Linear]:
    """The down projection of each expert as a linear layer on the memory of the stacked weights.

    They are made anew when the model was moved or converted: the old ones would hold the old memory.
    """
    stacked: Tensor = module.down_proj.data  # type: ignore[assignment]
    known = _WRITERS.get(module)
    if known is not None and known[0].weight.data_ptr() == stacked.data_ptr():
        return known
    made = []
    for weight in stacked if not is_transposed(module) else stacked.transpose(1, 2):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        made.append(linear)
    _WRITERS[module] = made
    return made


class NeuronTap(nn.Module):
    """Stands for the linear layer whose input would hold all neurons of a layer."""

    def __init__(self, parts: list[NeuronPart], block: nn.Module) -> None:
        """Make the tap of a layer whose neurons are in `parts`, all of them inside `block`."""
        super().__init__()
        # In a tuple, so that the model's modules do not become children of this one.
        self._inner = (parts, block)
        self.width = sum(part.width for part in parts)
        self.width_per_token = self.width
        """The number of neurons that a token was routed to in the last call; before the first, of all."""
        self._hooks: dict[int, tuple[bool, Callable[..., Any]]] = {}
        self._made = 0
        self._undo: list[Callable[[], None]] = []
        self._hidden = torch.empty(1, 0, 0)
        self._kinds: list[Tensor] = []
        self._call = object()
        self._routed: dict[int, int] = {}
        self._shown: dict[int, Tensor] = {}

    @property
    def parts(self) -> list[NeuronPart]:
        """The parts that the neurons are in, in the order of their numbers."""
        return self._inner[0]

    def linear_parts(self) -> list[tuple[str, nn.Module, int, int]]:
        """Linear layers whose inputs are the neurons, with the number of their first neuron and their width.

        Of stacked experts they are made for the purpose, and share the memory of the stacked weights.
        """
        found: list[tuple[str, nn.Module, int, int]] = []
        for part in self.parts:
            if not part.experts:
                found.append((part.name, part.module, part.start, part.width))
                continue
            width = part.expert_width
            for expert, linear in enumerate(writers(part.module)):
                found.append((f"{part.name}.{expert}", linear, part.start + expert * width, width))
        return found

    @property
    def weight(self) -> Tensor:
        """A weight that reads some of the neurons, which tells their device and type."""
        part = self.parts[0]
        weight: Tensor = part.module.down_proj if part.experts else part.module.weight  # type: ignore[assignment]
        return weight

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> "TapHandle":  # type: ignore[override]
        """Register a hook on the activations [rows, tokens, neurons], called as that of a linear layer."""
        return self._register(hook, False)

    def register_routed_hook(self, hook: RoutedHook) -> "TapHandle":
        """Register a hook on the activations of routed tokens, which is called once for each part."""
        return self._register(hook, True)

    def _register(self, hook: Callable[..., Any], routed: bool) -> "TapHandle":
        if (active := self._active()) is not self:
            return active._register(hook, routed)
        if not self._hooks:
            self._install()
        self._made += 1
        self._hooks[self._made] = (routed, hook)
        return TapHandle(self, self._made)

    def _active(self) -> "NeuronTap":
        """The tap that the experts run through now, which may be that of another anatomy of the same model.

        Its hooks and ours act one after the other. Two replacements of one forward would hide the first.
        """
        replaced = (vars(part.module).get("forward") for part in self.parts if part.experts)
        return next((forward.tap for forward in replaced if isinstance(forward, _Replaced)), self)

    def remove(self, number: int) -> None:
        """Remove a hook by its number; after the last one the model runs its own code again."""
        if self._hooks.pop(number, None) is not None and not self._hooks:
            self._uninstall()

    def _install(self) -> None:
        parts, block = self._inner
        self._undo.append(block.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(block.register_forward_hook(self._end).remove)
        for number, part in enumerate(parts):
            if part.experts:
                self._undo.append(_replaced(part.module, _Replaced(self, self._experts(number))))
            else:
                handle = part.module.register_forward_pre_hook(self._linear(number))
                self._undo.append(handle.remove)

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._end()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the block reads: experts see tokens of all rows in one list, and some only a part."""
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        hidden = next((x for x in given if x.ndim == 3), None)
        if hidden is None:
            raise EditError(
                f"{type(module).__name__} was called without hidden states [rows, tokens, hidden]"
            )
        self._hidden, self._call, self._routed = hidden, object(), {}
        self._kinds = [x for x in given if x.shape == hidden.shape[:2] and not x.is_floating_point()]
        self._shown = {}

    def _end(self, *_: Any) -> None:
        """Keep no activations after a call."""
        self._hidden, self._kinds, self._shown = self._hidden[:, :0], [], {}

    def _experts(self, number: int) -> Callable[..., Tensor]:
        part = self.parts[number]

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            routed = bool(args or kwargs)
            read = hidden.reshape(-1, hidden.shape[-1])
            places = self._places(part.name, read, len(read) if routed else len(read) // part.experts)

            def show(values: Tensor, token: Tensor, expert: Tensor) -> Tensor:
                return self._show(number, values, places[token], expert)

            return experts_forward(part.module, show, hidden, *args, **kwargs)

        return forward

    def _places(self, name: str, read: Tensor, tokens: int) -> Tensor:
        """Where the tokens of a call are among all tokens of the rows [tokens].

        Most experts read all of them. Some families send image tokens to experts of their own (ERNIE 4.5 VL):
        the tokens are those of one kind, which is proven by what is read.
        """
        rows, length = self._hidden.shape[:2]
        if tokens == rows * length:
            return torch.arange(tokens, device=read.device)
        hidden = self._hidden.flatten(0, 1)
        for kinds in self._kinds:
            for chosen in (kinds.flatten() == 0, kinds.flatten() != 0):
                found = torch.nonzero(chosen).flatten()
                if len(found) == len(read) == tokens and _same(hidden[found], read):
                    return found
        raise EditError(f"{name} was called on {tokens} of {rows * length} tokens, and which is not known")

    def _linear(self, number: int) -> Callable[..., Tensor]:
        part = self.parts[number]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            values = args[0].reshape(-1, args[0].shape[-1])
            places = self._places(part.name, values, len(values))
            return self._show(number, values, places, torch.zeros_like(places)).reshape(args[0].shape)

        return hook

    def _show(self, number: int, values: Tensor, places: Tensor, expert: Tensor) -> Tensor:
        """Show hooks the activations of one part, in the order in which they were registered."""
        part, (rows, length) = self.parts[number], self._hidden.shape[:2]
        where = (places // length, places % length, expert)
        routed = Routed(values, *where, part.start, max(part.experts, 1), (rows, length), self._call)
        for takes_routed, hook in list(self._hooks.values()):
            found = hook(routed) if takes_routed else self._show_all(number, routed, hook)
            if found is not None:
                routed = routed._replace(values=found)
        if any(not takes_routed for takes_routed, _ in self._hooks.values()):
            self._shown[number] = _dense(routed)
        self._routed[number] = values.numel() // max(rows * length, 1)
        self.width_per_token = sum(self._routed.values())
        return routed.values

    def _show_all(self, number: int, routed: Routed, hook: Callable[..., Any]) -> Tensor | None:
        """Show a hook the activations of all neurons of the layer; returns those of one part as edited.

        The parts are computed one after the other. The hook runs once for each, on all neurons of the layer:
        zeros where a part is still to come. The last run therefore sees all activations. Of each run only the
        part that was new is used, so an edit has to treat every neuron by itself, as scales and masks do.
        """
        parts = []
        for i, part in enumerate(self.parts):
            known = _dense(routed) if i == number else self._shown.get(i)
            if known is None or known.shape[:-1] != routed.size:
                known = routed.values.new_zeros(*routed.size, part.width)
            parts.append(known)
        edited = hook(self, (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0],))
        if edited is None:
            return None
        width = routed.values.shape[-1]
        own = edited[..., routed.start : routed.start + routed.expert_count * width]
        split: Tensor = own.unflatten(-1, (routed.expert_count, width))
        return split[routed.rows, routed.positions, routed.experts]


def _same(first: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, where NaN equals NaN."""
    return bool(((first == other) | (first.isnan() & other.isnan())).all())


class _Replaced:
    """The forward of experts while a tap has hooks."""

    def __init__(self, tap: NeuronTap, forward: Callable[..., Tensor]) -> None:
        self.tap, self._forward = tap, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(*args, **kwargs)


class TapHandle:
    """Removes a hook from a `NeuronTap`. Safe to use twice."""

    def __init__(self, tap: NeuronTap, number: int) -> None:
        """Made by the tap."""
        self._tap, self._number = tap, number

    def remove(self) -> None:
        """Remove the hook."""
        self._tap.remove(self._number)


def _dense(routed: Routed) -> Tensor:
    """The activations of one part [rows, tokens, its neurons], with zeros where a token is not routed."""
    width = routed.values.shape[-1]
    if routed.expert_count == 1 and len(routed.values) == routed.size[0] * routed.size[1]:
        return routed.values.reshape(*routed.size, width)
    dense = routed.values.new_zeros(*routed.size, routed.expert_count, width)
    places = (routed.rows, routed.positions, routed.experts)
    return dense.index_put(places, routed.values).flatten(-2)


def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Replace a module's forward; returns what undoes it."""
    attributes = vars(module)
    own = attributes.get("forward")
    attributes["forward"] = forward

    def undo() -> None:
        if own is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = own

    return undo


def is_experts(module: nn.Module, hidden: int) -> bool:
    """Whether a module holds the stacked weights of experts that write into the residual stream."""
    down = getattr(module, "down_proj", None)
    up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    if not isinstance(down, Tensor) or not isinstance(up, Tensor):
        return False
    return down.ndim == up.ndim == 3 and hidden in down.shape[1:] and len(down) > 1


def is_transposed(module: Any) -> bool:
    """Whether stacked weights are [experts, input, output] rather than [experts, output, input]."""
    stated = getattr(module, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    down, up = module.down_proj, getattr(module, "gate_up_proj", None)
    if up is None:  # without a gate both layouts have the same shapes: take that of linear layers
        return False
    # Of a gated FFN the first projection is twice as wide as the second reads.
    return bool(up.shape[2] == 2 * down.shape[1])


def expert_sizes(module: Any) -> tuple[int, int]:
    """The number of experts, and the number of neurons of each."""
    count, *sides = module.down_proj.shape
    return int(count), int(sides[0] if is_transposed(module) else sides[1])


def experts_forward(
    module: nn.Module,
    show: Show,
    hidden: Tensor,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    gammas: Tensor | None = None,
) -> Tensor:
    """Compute stacked experts as their own forward does, and show their activations on the way.

    Args:
        module: holds the stacked weights.
        show: see `Show`.
        hidden: [tokens, hidden]; without `index`, [experts * tokens, hidden] with what each expert reads,
            which already is multiplied by the routing weight, and is 0 for tokens that are not routed to it
            (Llama 4).
        index: the experts [tokens, k] that each token is routed to.
        weights: their routing weights [tokens, k].
        gammas: instead of these, the weight [tokens, experts] of every expert for every token.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if gammas is not None:
        count = expert_sizes(module)[0]
        index = torch.arange(count, device=hidden.device).expand(len(flat), -1)
        weights = gammas.reshape(-1, count)
    if index is None:
        return _scaled_before(module, show, flat)
    assert weights is not None
    token, slot, expert, sizes = _pairs(index, expert_sizes(module)[0])
    weight = weights[token, slot, None]
    normed = bool(getattr(module, "has_post_expert_norm", False))
    read = flat[token].split(sizes)
    z = torch.cat([_activate(module, x, i) for i, x in enumerate(read) if len(x)] or [_none(module, flat)])
    z = show(z if normed else (z * weight).to(z.dtype), token, expert)
    out = flat.new_zeros(flat.shape, dtype=torch.promote_types(flat.dtype, weights.dtype))
    pieces = zip(z.split(sizes), token.split(sizes), weight.split(sizes), strict=True)
    for i, (active, to, scale) in enumerate(pieces):
        if not len(to):
            continue
        written = _write(module, active, i, None if normed else scale)
        if normed:
            written = module.post_expert_norm(written) * scale  # type: ignore[operator]
        out.index_add_(0, to, written.to(out.dtype))
    return out.to(flat.dtype).reshape(hidden.shape)


def _pairs(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The token, slot and expert of every routed pair, by ascending expert, and the pairs per expert.

    A number outside of 0 to `count - 1` stands for no expert: some routers send tokens nowhere.
    """
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    order = order[(flat[order] >= 0) & (flat[order] < count)]
    expert = flat[order]
    slots = index.shape[-1]
    sizes: list[int] = torch.bincount(expert, minlength=count).tolist()
    return order // slots, order % slots, expert, sizes


def _scaled_before(module: nn.Module, show: Show, read: Tensor) -> Tensor:
    """Experts whose inputs [experts * tokens, hidden] are scaled by the routing weights (Llama 4)."""
    count = expert_sizes(module)[0]
    split = read.view(count, -1, read.shape[-1])
    pairs = torch.nonzero((split != 0).any(-1))  # by ascending expert
    expert, token = pairs[:, 0], pairs[:, 1]
    sizes: list[int] = torch.bincount(expert, minlength=count).tolist()
    pieces = split[expert, token].split(sizes)
    z = torch.cat([_activate(module, x, i) for i, x in enumerate(pieces) if len(x)] or [_none(module, read)])
    z = show(z, token, expert)
    written = [_write(module, x, i) for i, x in enumerate(z.split(sizes)) if len(x)]
    if not written:
        return torch.zeros_like(read)
    return torch.zeros_like(split).index_put((expert, token), torch.cat(written)).reshape(read.shape)


def _none(module: nn.Module, like: Tensor) -> Tensor:
    """The activations of no token."""
    return like.new_zeros(0, expert_sizes(module)[1])


def _activate(module: Any, x: Tensor, expert: int) -> Tensor:
    """The activations [tokens, width] of one expert."""
    if isinstance(getattr(module, "gate_proj", None), Tensor):
        gate = _linear(module, "gate_proj", x, expert)
        return module.act_fn(gate) * _linear(module, "up_proj", x, expert)  # type: ignore[no-any-return]
    gated = hasattr(module, "gate_up_proj")
    read = _linear(module, "gate_up_proj" if gated else "up_proj", x, expert)
    if hasattr(module, "_apply_gate") and gated:
        return module._apply_gate(read)  # type: ignore[no-any-return]
    if not gated:
        return module.act_fn(read)  # type: ignore[no-any-return]
    gate, up = read.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]


def _write(module: nn.Module, z: Tensor, expert: int, weight: Tensor | None = None) -> Tensor:
    """What one expert writes [tokens, hidden]; a bias is multiplied by the routing weight as well."""
    return _linear(module, "down_proj", z, expert, weight)


def _linear(module: nn.Module, name: str, x: Tensor, expert: int, weight: Tensor | None = None) -> Tensor:
    stacked: Tensor = getattr(module, name)
    y = x @ stacked[expert] if is_transposed(module) else functional.linear(x, stacked[expert])
    bias = getattr(module, f"{name}_bias", None)
    if bias is None:
        return y
    scaled: Tensor = bias[expert] if weight is None else bias[expert] * weight
    return y + scaled
