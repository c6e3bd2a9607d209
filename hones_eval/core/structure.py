"""Find the heads and neurons of decoder layers from their structure, without a list of module names.

Every layer writes into the residual stream through linear layers with as many outputs as the stream is wide.
A block that mixes tokens (attention, a recurrent mixer, a convolution) writes through its last such linear
layer, whose input holds the heads. An FFN writes through its down projection, whose input holds the neurons,
or through the stacked weights of experts. `hones_eval.core.anatomy` runs the model once to learn the order of
calls, and proves the result by experiments.

A decoder layer may mix tokens more than once: in an encoder-decoder its self-attention reads the answer so
far, and its cross-attention reads the encoder's output. `layer_parts` then returns one entry per mixer, in
the order of calls, and the last one has the neurons.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hones_eval.core.experts import NeuronPart, NeuronTap, expert_sizes, is_experts
from hones_eval.core.hooks import Site
from hones_eval.errors import UnsupportedModelError

# Attributes by which blocks state the width and the number of their heads. Values may be narrower than keys.
WIDTHS = ("v_head_dim", "head_v_dim", "head_dim", "attention_head_size", "head_size")
COUNTS = ("num_v_heads", "num_heads", "num_attention_heads", "n_heads", "n_head")


class Call(NamedTuple):
    """A call of a module in the probing pass: when it came, and its first output tensor."""

    order: int
    output: Tensor


# Parts of names by which the linear layer that writes is preferred where the order of calls is not known.
WRITES = ("o_proj", "out_proj", "down_proj", "fc2", "w2", "wo", "dense_4h_to_h", "dense")


def calls_by_registration(layers: Sequence[nn.Module]) -> dict[nn.Module, Call]:
    """Calls of the linear layers of decoder layers as far as their registration tells, without a pass.

    For models on the meta device, many of which cannot be run there. Modules count as called in the order in
    which they are registered, those with the name of an output projection last.
    """
    found: dict[nn.Module, Call] = {}
    for layer in layers:
        for number, (path, module) in enumerate(layer.named_modules()):
            size = getattr(module, "out_features", None)
            if isinstance(size, int):
                last = path.rpartition(".")[2] in WRITES
                output = torch.empty(1, 1, size, device="meta")
                found[module] = Call(number + (1_000_000 if last else 0), output)
    return found


class HeadGroup(NamedTuple):
    """Where the heads of a layer are: a linear layer's input, cut into `heads` slices of `width`.

    `heads` is 0 where the block has no heads, as in a short convolution.
    """

    site: Site
    heads: int
    width: int
    attention: nn.Module


class NeuronGroup(NamedTuple):
    """Where the neurons of a layer are; `experts` and `expert_width` are 0 without routed experts.

    Where a layer has several groups of experts they are 0 too, and `several` has the number of experts and
    the width of each of every group.
    """

    site: Site
    ffn: nn.Module
    experts: int
    expert_width: int
    several: Sequence[Sequence[int]] = ()


class LayerParts(NamedTuple):
    """The heads of one mixer of a decoder layer, and the neurons after its last mixer; None for none."""

    heads: HeadGroup | None
    neurons: NeuronGroup | None


def layer_parts(
    layer: nn.Module, path: str, hidden: int, calls: dict[nn.Module, Call], config: Any, name: str
) -> list[LayerParts]:
    """Find the heads and the neurons of one decoder layer, with one entry per block that mixes tokens.

    Args:
        layer: the decoder layer.
        path: its name in the model, for messages.
        hidden: the width of the residual stream.
        calls: the probing pass's calls of the layer's modules.
        config: the language model's configuration.
        name: the model's name, for messages.

    Raises: UnsupportedModelError.
    """
    mixers: list[tuple[str, str, nn.Module]] = []
    parts: list[tuple[str, nn.Module]] = []
    for child_name, child in _blocks(layer):
        found = [(f"{child_name}.{inner}".rstrip("."), m) for inner, m in _writers(child, hidden, calls)]
        experts = [
            (f"{child_name}.{inner}".rstrip("."), m)
            for inner, m in child.named_modules()
            if is_experts(m, hidden)
        ]
        if not found and not experts:
            continue
        if not experts and mixes_tokens(child):
            mixers.append((child_name, *max(found, key=lambda writer: calls[writer[1]].order)))
        else:
            parts += [*experts, *_last_of_each_block(child, child_name, found, calls)]
    mixers.sort(key=lambda mixer: calls[mixer[2]].order)
    heads = [_head_group(layer, path, mixer, calls, config, name) for mixer in mixers]
    if any(group.heads for group in heads):  # a convolution beside an attention has no heads to offer
        heads = [group for group in heads if group.heads]
    neurons = _neuron_group(layer, path, parts, calls, hidden) if parts else None
    if not heads:
        return [LayerParts(None, neurons)]
    return [*(LayerParts(group, None) for group in heads[:-1]), LayerParts(heads[-1], neurons)]


def _blocks(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a layer; the members of a list count as children (T5 keeps its blocks in one)."""
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", member) for inner, member in _blocks(child))
        else:
            yield name, child


def _writers(block: nn.Module, hidden: int, calls: dict[nn.Module, Call]) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of a block that were called and have as many outputs as the residual stream is wide.

    Any module with `in_features` and `out_features` counts, quantized ones and adapters included; what is
    inside such a module does not.
    """
    taken: list[str] = []
    for path, module in block.named_modules():
        if any(path.startswith(f"{outer}.") for outer in taken):
            continue
        if hasattr(module, "in_features"):
            taken.append(path or ".")
            if module in calls and calls[module].output.shape[-1] == hidden:
                yield path, module


def mixes_tokens(block: nn.Module) -> bool:
    """Whether a block mixes tokens: it states heads, or has a convolution."""
    heads = any(_stated(module, (*WIDTHS, *COUNTS)) for module in block.modules())
    return heads or any(isinstance(module, nn.Conv1d) for module in block.modules())


def _stated(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _last_of_each_block(
    child: nn.Module, child_name: str, found: list[tuple[str, nn.Module]], calls: dict[nn.Module, Call]
) -> list[tuple[str, nn.Module]]:
    """The last writer called in each module: gates and up projections may be as wide as the stream."""
    last: dict[str, tuple[str, nn.Module]] = {}
    for path, module in found:
        parent = path.rpartition(".")[0]
        if parent not in last or calls[module].order > calls[last[parent][1]].order:
            last[parent] = (path, module)
    return list(last.values())


def _head_group(
    layer: nn.Module,
    path: str,
    mixer: tuple[str, str, nn.Module],
    calls: dict[nn.Module, Call],
    config: Any,
    name: str,
) -> HeadGroup:
    block, inner, module = mixer
    site = Site(f"{path}.{inner}", module, int(module.in_features))  # type: ignore[arg-type]
    heads, width = _head_sizes(layer.get_submodule(block), site, config, name)
    return HeadGroup(site, heads, width, outermost(layer, inner, module, calls))


def _head_sizes(block: nn.Module, site: Site, config: Any, name: str) -> tuple[int, int]:
    """The number of heads and their width, as the block states them, or else the configuration."""
    part = site.name.rpartition(".")[2]
    for module in block.modules():
        width, count = _stated(module, WIDTHS), _stated(module, COUNTS)
        if width is not None:
            if site.width % width:
                raise UnsupportedModelError(
                    f"{name}: {part} takes {site.width} features, not a multiple of the head width {width}"
                )
            _check_configuration(module, site.width, width, config, part, name)
            return site.width // width, width
        if count is not None and site.width % count == 0:
            return count, site.width // count
    if any(isinstance(module, nn.Conv1d) for module in block.modules()):
        return 0, 0
    heads = int(config.num_attention_heads)
    if site.width % heads:
        raise UnsupportedModelError(
            f"{name}: {part} takes {site.width} features, not a multiple of {heads} heads"
        )
    return heads, site.width // heads


def _check_configuration(
    module: nn.Module, total: int, width: int, config: Any, part: str, name: str
) -> None:
    """Where all layers are alike, the configuration has to agree with the module about the heads."""
    alike = len(set(getattr(config, "layer_types", None) or [])) <= 1
    if not alike or _stated(module, WIDTHS[:2]) is not None:
        return
    heads, stated = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    if isinstance(stated, int) and isinstance(heads, int) and stated * heads != total:
        raise UnsupportedModelError(
            f"{name}: {part} takes {total} features, but the configuration says {heads} heads of {stated}"
        )
    if isinstance(heads, int) and total % heads:
        raise UnsupportedModelError(f"{name}: {part} takes {total} features, not a multiple of {heads} heads")


def _neuron_group(
    layer: nn.Module,
    path: str,
    parts: list[tuple[str, nn.Module]],
    calls: dict[nn.Module, Call],
    hidden: int,
) -> NeuronGroup:
    """The neurons of a layer: of its routed experts, then of shared experts or of its dense FFN.

    Narrow FFNs beside the main one, which some families use to add embeddings per layer, are left out.
    """
    routed = [(inner, m) for inner, m in parts if is_experts(m, hidden)]
    dense = [(inner, m) for inner, m in parts if not is_experts(m, hidden)]
    tops = {inner.split(".")[0] for inner, _ in routed}
    beside = [(inner, m) for inner, m in dense if inner.split(".")[0] in tops]
    rest = [part for part in dense if part not in beside]
    widest = max(rest, key=lambda part: (int(part[1].in_features), calls[part[1]].order), default=None)  # type: ignore[arg-type]
    if widest is not None and (not routed or not beside):
        beside = [*beside, widest]
    if not routed and len(beside) == 1 and calls[beside[0][1]].output.ndim == 3:
        inner, module = beside[0]
        site = Site(f"{path}.{inner}", module, int(module.in_features))  # type: ignore[arg-type]
        return NeuronGroup(site, outermost(layer, inner, module, calls), 0, 0)
    start, numbered = 0, []
    for inner, module in [*routed, *beside]:
        experts, each = expert_sizes(module) if is_experts(module, hidden) else (0, 0)
        width = experts * each if experts else int(module.in_features)  # type: ignore[arg-type]
        numbered.append(NeuronPart(f"{path}.{inner}", module, start, width, experts))
        start += width
    block_name, block = _common_block(layer, [inner for inner, _ in [*routed, *beside]])
    tap = NeuronTap(numbered, block)
    name = ".".join(filter(None, (path, block_name)))
    if not routed:  # one FFN that gets the tokens of all rows in one list (OPT)
        inner, module = beside[0]
        return NeuronGroup(Site(f"{path}.{inner}", tap, start), layer, 0, 0)
    groups = [expert_sizes(module) for _, module in routed]
    count, each = groups[0] if len(groups) == 1 else (0, 0)
    several = [list(group) for group in groups] if len(groups) > 1 else []
    return NeuronGroup(Site(f"{name} (experts)", tap, start), block, count, each, several)


def _common_block(layer: nn.Module, inners: Sequence[str]) -> tuple[str, nn.Module]:
    """The smallest module inside a layer that holds all of some modules; the layer itself where none does."""
    shared = inners[0].split(".")
    if len(inners) == 1:
        shared = shared[:-1]
    for inner in inners[1:]:
        other = inner.split(".")
        shared = shared[
            : next((i for i, (a, b) in enumerate(zip(shared, other, strict=False)) if a != b), len(shared))
        ]
    path = ".".join(shared)
    return path, layer.get_submodule(path) if path else layer


def outermost(layer: nn.Module, inner: str, module: nn.Module, calls: dict[nn.Module, Call]) -> nn.Module:
    """The largest module inside a layer whose output is exactly what one linear layer wrote.

    Its forward can be replaced by the linear layer's output. Where the writer's parent adds something, as the
    residual in BERT, that is the linear layer itself. On the meta device it is the writer's parent.
    """
    best, path, written = module, inner, calls[module].output
    while "." in path:
        path = path.rpartition(".")[0]
        outer = layer.get_submodule(path)
        call = calls.get(outer)
        if call is None and not written.is_meta:
            break
        if call is not None and call.output.shape != written.shape:
            break
        if call is not None and not written.is_meta and not torch.equal(call.output, written):
            break
        best = outer
    return best
