"""Neurons of mixtures of experts, as the input of one linear layer would present them.

In a mixture of experts a neuron is (layer, expert, i). The neurons of a layer are numbered in one row: those
of expert 0, then those of expert 1, and so on, and last those of shared experts or of a dense FFN beside
them.

transformers stores the routed experts as stacked weights and computes them inside one module, so there is no
linear layer whose input holds all their neurons. `NeuronTap` takes that role: it can be hooked like a linear
layer, and receives the activations [rows, tokens, neurons]. While a hook is on it, it replaces the experts'
forward by an equivalent one that shows its activations to the hooks in between. Without hooks the model runs
its own code. `experts_forward` is compared with the model's own experts before anything relies on it.

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
from torch.utils.hooks import RemovableHandle

from hones_eval.errors import EditError

Show = Callable[[Tensor], Tensor]
"""Shows activations [tokens, experts, width] to hooks, and returns them as the hooks have edited them."""


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
        weight: Tensor = self.module.down_proj if self.experts else self.module.weight  # type: ignore[assignment]
        if not self.experts:
            return weight
        if not is_transposed(self.module):
            weight = weight.transpose(1, 2)  # [experts, width, hidden]
        return weight.flatten(0, 1).T


# A linear layer per expert, whose weight is that expert's part of the stacked weights.
_WRITERS: "WeakKeyDictionary[nn.Module, list[nn.Linear]]" = WeakKeyDictionary()


def writers(module: nn.Module) -> list[nn.Linear]:
    """The down projection of each expert as a linear layer on the memory of the stacked weights."""
    if module not in _WRITERS:
        stacked: Tensor = module.down_proj  # type: ignore[assignment]
        made = []
        for weight in stacked.data if not is_transposed(module) else stacked.data.transpose(1, 2):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            made.append(linear)
        _WRITERS[module] = made
    return _WRITERS[module]


class NeuronTap(nn.Module):
    """Stands for the linear layer whose input would hold all neurons of a layer."""

    def __init__(self, parts: list[NeuronPart], block: nn.Module) -> None:
        """Make the tap of a layer whose neurons are in `parts`, all of them inside `block`."""
        super().__init__()
        # In a list of a tuple, so that the model's modules do not become children of this one.
        self._inner = (parts, block)
        self.width = sum(part.width for part in parts)
        self._open = 0
        self._undo: list[Callable[[], None]] = []
        self._rows = 1
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

    def forward(self, x: Tensor) -> Tensor:
        """The activations as they are; hooks on this module see and edit them."""
        return x

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook on the activations [rows, tokens, neurons]; it activates the tap."""
        handle = super().register_forward_pre_hook(*args, **kwargs)
        if self._open == 0:
            self._install()
        self._open += 1
        remove = handle.remove
        removed: list[bool] = []

        def close() -> None:
            remove()
            if not removed:
                removed.append(True)
                self._open -= 1
                if self._open == 0:
                    self._uninstall()

        handle.remove = close  # type: ignore[method-assign]
        return handle

    def _install(self) -> None:
        parts, block = self._inner
        self._undo.append(block.register_forward_pre_hook(self._note_rows, with_kwargs=True).remove)
        for number, part in enumerate(parts):
            if part.experts:
                self._undo.append(_replaced(part.module, self._experts(number)))
            else:
                handle = part.module.register_forward_pre_hook(self._linear(number))
                self._undo.append(handle.remove)

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._shown = {}

    def _note_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Experts see tokens of all rows in one list: note how many rows there are."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3]
        if not tensors:
            raise EditError(
                f"{type(module).__name__} was called without hidden states [rows, tokens, hidden]"
            )
        self._rows = len(tensors[0])
        self._shown = {}

    def _experts(self, number: int) -> Callable[..., Tensor]:
        part = self.parts[number]

        def show(z: Tensor) -> Tensor:
            if len(z) % self._rows:
                raise EditError(f"{part.name} was called on some tokens of {self._rows} rows only")
            shown = self._show(number, z.reshape(self._rows, -1, part.width))
            return shown.reshape(z.shape)

        return lambda *args, **kwargs: experts_forward(part.module, show, *args, **kwargs)

    def _linear(self, number: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            x = args[0]
            return self._show(number, x.reshape(self._rows, -1, x.shape[-1])).reshape(x.shape)

        return hook

    def _show(self, number: int, x: Tensor) -> Tensor:
        """Show hooks the activations of one part, with those of the other parts where they are.

        The parts are computed one after the other. Hooks run once for each, on all neurons of the layer:
        zeros where a part is still to come. The last run therefore sees all activations. Of each run only the
        part that was new is used, so an edit has to treat every neuron by itself, as scales and masks do.
        """
        self._shown[number] = x
        if len(self.parts) == 1:
            edited: Tensor = self(x)
            return edited
        row = [self._shown.get(i) for i in range(len(self.parts))]
        tensors = [
            x.new_zeros(*x.shape[:-1], part.width)
            if known is None or known.shape[:-1] != x.shape[:-1]
            else known
            for known, part in zip(row, self.parts, strict=True)
        ]
        part = self.parts[number]
        edited = self(torch.cat(tensors, dim=-1))
        self._shown[number] = edited[..., part.start : part.start + part.width]
        return self._shown[number]


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
    if up is None:
        return bool(module.up_proj.shape[2] == down.shape[1])
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
) -> Tensor:
    """Compute stacked experts as their own forward does, and show their activations on the way.

    Args:
        module: holds the stacked weights.
        show: see `Show`.
        hidden: [tokens, hidden]; without `index`, [experts * tokens, hidden] with what each expert reads,
        which
            already is multiplied by the routing weight, and is 0 for tokens that are not routed to it (Llama
            4).
        index: the experts [tokens, k] that each token is routed to.
        weights: their routing weights [tokens, k].
    """
    count, width = expert_sizes(module)
    if index is None:
        read = hidden.view(count, -1, hidden.shape[-1])
        z = torch.stack([_activate(module, x, expert) for expert, x in enumerate(read)], dim=1)
        shown = show(z)
        return torch.cat([_write(module, shown[:, expert], expert) for expert in range(count)])
    assert weights is not None
    hidden = hidden.reshape(-1, hidden.shape[-1])
    routed = [torch.nonzero(index == expert) for expert in range(count)]
    normed = bool(getattr(module, "has_post_expert_norm", False))
    z = hidden.new_zeros(len(hidden), count, width)
    for expert, (token, slot) in enumerate(pairs.unbind(-1) for pairs in routed):
        if len(token):
            active = _activate(module, hidden[token], expert)
            z[token, expert] = active if normed else (active * weights[token, slot, None]).to(z.dtype)
    z = show(z)
    out = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weights.dtype))
    for expert, (token, slot) in enumerate(pairs.unbind(-1) for pairs in routed):
        if len(token):
            weight = weights[token, slot, None]
            written = _write(module, z[token, expert], expert, None if normed else weight)
            if normed:
                written = module.post_expert_norm(written) * weight  # type: ignore[operator]
            out.index_add_(0, token, written.to(out.dtype))
    return out.to(hidden.dtype)


def _activate(module: Any, x: Tensor, expert: int) -> Tensor:
    """The activations [tokens, width] of one expert."""
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
