"""The anatomy of a Hugging Face vision-language model: its heads, neurons, unembedding and image tokens.

There is no list of model classes or module names. The decoder comes from `get_decoder()`, the parts of its
layers from their structure (see `hones_eval.core.structure`), and experiments prove what was found before
anything relies on it: what holds heads must depend on other tokens and what holds neurons must not, an edit
of every kind of site must change the logits, and logits computed from hidden states must be the model's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core import edits
from hones_eval.core.adapters import effective_weight, has_adapter
from hones_eval.core.artifact import ModelShape
from hones_eval.core.experts import NeuronTap
from hones_eval.core.hooks import Site, editing, recording, replaced_forward
from hones_eval.core.structure import Call, HeadGroup, NeuronGroup, calls_by_registration, layer_parts
from hones_eval.core.unwrapping import unwrapped
from hones_eval.errors import EditError, HonesError, UnsupportedModelError, first_line

# Errors by which a model refuses a pass over text alone, or a layer a call that it does not expect.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
# Largest difference, relative to the largest value, that rounding explains.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
TOKENS = 5


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a model that scoring, replay and steering need.

    `layers`, `heads_in` and `neurons_in` have one entry per decoder layer of the language model: the layer,
    and the modules whose inputs hold the heads and the neurons. That is the linear layer through which
    attention or another token mixer writes into the residual stream (`o_proj` in most families), and the
    FFN's down projection (`down_proj`) or, in a mixture of experts, a `NeuronTap`. A layer without heads or
    neurons has a site of width 0 there; `shape` says how many each layer has.

    `attentions` and `ffns` are modules whose outputs are what these write. Where FFN and experts are no
    module of their own, `ffns` has the layer itself.
    """

    model: PreTrainedModel
    decoder: nn.Module
    layers: list[nn.Module]
    heads_in: list[Site]
    neurons_in: list[Site]
    attentions: list[nn.Module]
    ffns: list[nn.Module]
    final_norm: nn.Module
    unembed: nn.Linear
    soft_cap: float | None
    shape: ModelShape
    _last_step: "_LastStep" = field(default_factory=lambda: _LastStep())

    @classmethod
    def of(cls, model: nn.Module) -> "Anatomy":
        """Find the anatomy of a model and prove it by experiments.

        On the meta device only the structure is found: there are no values to experiment with.

        Raises: UnsupportedModelError, which names the model and the reason.
        """
        if isinstance(known := getattr(model, "anatomy", None), cls):  # what `hones_eval.load` returns
            return known
        model = unwrapped(model)
        name = type(model).__name__
        model = _answering(model)
        decoder = _decoder(model, name)
        config: Any = decoder.config
        layers, path = _layers(decoder, config, name)
        unembed = unembedding_of(model)
        if unembed is None:
            raise UnsupportedModelError(f"{name} has no unembedding (get_output_embeddings() gives None)")
        vocabulary, hidden = (int(size) for size in unembed.weight.shape)
        empty = unembed.weight.is_meta and not _is_offloaded(model)
        probe, final_norm = None, nn.Module()
        if empty:
            calls, width = calls_by_registration(layers), hidden
        else:
            probe = _Probe(decoder, layers, decoder.get_submodule(path.rpartition(".")[0]), hidden, name)
            calls, final_norm, width = probe.first_pass()
            decoder = probe.decoder
        parts = [
            layer_parts(layer, f"{path}.{i}".lstrip("."), width, calls, _of_layer(config, i), name)
            for i, layer in enumerate(layers)
        ]
        heads, neurons = [pair[0] for pair in parts], [pair[1] for pair in parts]
        _check_alike(layers, heads, neurons, path, name)
        if not any(heads) or not any(neurons):
            kind = "heads" if not any(heads) else "neurons"
            raise UnsupportedModelError(f"{name}: no layer of {path} has {kind} that could be found")
        anatomy = cls(
            model=model,
            decoder=decoder,
            layers=layers,
            heads_in=[NOTHING if group is None else group.site for group in heads],
            neurons_in=[NOTHING if group is None else group.site for group in neurons],
            attentions=[layers[i] if group is None else group.attention for i, group in enumerate(heads)],
            ffns=[layers[i] if group is None else group.ffn for i, group in enumerate(neurons)],
            final_norm=final_norm,
            unembed=unembed,
            soft_cap=getattr(config, "final_logit_softcapping", None),
            shape=_shape(heads, neurons, width, vocabulary),
        )
        if probe is not None:
            _prove(anatomy, probe, name)
        return anatomy

    @property
    def unembedding(self) -> Tensor:
        """The unembedding matrix `U` [vocabulary, hidden], tied to the embedding or not."""
        weight: Tensor = self.unembed.weight
        return weight

    def down_weight(self, layer: int) -> Tensor:
        """What the neurons of a layer write, `W_down` [hidden, neurons], with zeros for neurons it lacks.

        The adapter of a layer is part of it.
        """
        site = self.neurons_in[layer]
        if not site.width:
            return self.unembedding.new_zeros(self.shape.hidden, self.shape.neurons)
        module = site.module
        if has_adapter(module):
            return self.padded(effective_weight(module, site.width))
        weights = (
            [p.down_weight() for p in module.parts] if isinstance(module, NeuronTap) else [module.weight]
        )
        if not all(isinstance(weight, Tensor) and weight.is_floating_point() for weight in weights):
            raise HonesError(f"{site.name} is quantized: its neurons' write directions cannot be read")
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)  # type: ignore[arg-type]
        return self.padded(weight)  # type: ignore[arg-type]

    def has_plain_ffn(self, layer: int) -> bool:
        """Whether a layer's neurons are the input [rows, tokens, neurons] of one linear layer."""
        site = self.neurons_in[layer]
        return site.width > 0 and not isinstance(site.module, NeuronTap)

    def padded(self, neurons: Tensor) -> Tensor:
        """Neurons of one layer [..., its neurons] with zeros up to the width of the widest layer."""
        missing = self.shape.neurons - neurons.shape[-1]
        return torch.nn.functional.pad(neurons, (0, missing)) if missing else neurons

    def head_features(self, heads: Tensor, layer: int) -> Tensor:
        """One number per head [..., H] as one per input feature [..., width] of a layer's head site."""
        shape, width = self.shape, self.heads_in[layer].width
        if not shape.heads_of(layer):
            return heads.new_ones(*heads.shape[:-1], width)
        return heads[..., : shape.heads_of(layer)].repeat_interleave(shape.head_width_of(layer), dim=-1)

    def neuron_features(self, neurons: Tensor, layer: int) -> Tensor:
        """One number per neuron [..., I], without those that a layer lacks."""
        return neurons[..., : self.neurons_in[layer].width]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden] after the last layer.

        Computed by final norm, unembedding and soft cap where that is proven to give the model's own logits,
        and by the model itself where it scales or masks them in another way.

        Raises: HonesError when neither gives the model's logits.
        """
        if self._last_step.refused is not None:
            raise HonesError(self._last_step.refused)
        if self._last_step.own is not None:
            return self._last_step.own(hidden)
        return self._direct_logits(hidden)

    def _direct_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.unembed(self.final_norm(hidden))
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def image_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Whether each position is an image token: bool [batch, tokens], by the image token id.

        Raises: HonesError when the configuration names no image token, or none is in the input.
        """
        config = self.model.config
        ids = [getattr(config, key, None) for key in ("image_token_id", "image_token_index")]
        known = [i for i in ids if i is not None]
        if not known:
            raise HonesError(f"{type(self.model).__name__}: its configuration names no image token id")
        mask: Tensor = inputs["input_ids"] == known[0]
        if not bool(mask.any()):
            raise HonesError(f"no image token (id {known[0]}) in input_ids: the prompt has no image")
        return mask


NOTHING = Site("nothing", nn.Module(), 0)
"""The site of a layer that has no heads, or no neurons."""


@dataclass
class _LastStep:
    """How logits come from hidden states, once that is proven."""

    own: Callable[[Tensor], Tensor] | None = None
    refused: str | None = None


def _answering(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads prompts and answers, where the model as a whole has no forward pass.

    Qwen2.5-Omni and Qwen3-Omni consist of a thinker, which is a vision-language model, and of parts that
    speak.
    """
    if not isinstance(model, PreTrainedModel) or type(model).forward is not nn.Module.forward:
        return model
    inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    answering = [part for part in inner if part.get_output_embeddings() is not None]
    return answering[0] if answering else model


def unembedding_of(model: PreTrainedModel) -> Any:
    """The unembedding of a model, or of the language model inside a model that does not pass it on."""
    parts = [model, *(part for part in model.modules() if isinstance(part, PreTrainedModel))]
    return next((u for part in parts if (u := part.get_output_embeddings()) is not None), None)


def _decoder(model: PreTrainedModel, name: str) -> nn.Module:
    text = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or text.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} has an encoder-decoder language model ({text.model_type}): its answers also depend on "
            "cross-attention, which heads and neurons of one decoder stack do not describe"
        )
    decoder = model.get_decoder()
    if decoder is None or not hasattr(decoder, "config"):
        raise UnsupportedModelError(f"{name}: get_decoder() gives no language model")
    # Causal language models inside a vision-language model keep their layers one level down.
    while (inner := decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder) is not decoder:
        decoder = inner
    return decoder  # type: ignore[no-any-return]


def _layers(decoder: nn.Module, config: Any, name: str) -> tuple[list[nn.Module], str]:
    try:
        count = int(config.num_hidden_layers)
    except AttributeError:
        raise UnsupportedModelError(
            f"{name}: the configuration of {type(decoder).__name__} ({config.model_type}) states no number "
            "of layers, so it is not one decoder stack that answers token by token"
        ) from None
    stacks = [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _inside_layers(path)
    ]
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"{name}: looked in {type(decoder).__name__} for one list of {count} layers, found {len(stacks)}"
        )
    path, stack = stacks[0]
    crossed = [
        i
        for i, layer in enumerate(stack)
        if _has_part(layer, "cross_attn") or _has_part(layer, "crossattention")
    ]
    if crossed:
        raise UnsupportedModelError(
            f"{name}: layers {crossed} attend to the image by cross-attention; only language models that "
            "read image tokens in their own sequence are served"
        )
    return list(stack), path


def _inside_layers(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _has_part(module: nn.Module, part: str) -> bool:
    return any(part in path for path, _ in module.named_modules())


def _of_layer(config: Any, layer: int) -> Any:
    """The configuration of one layer, in families whose layers have settings of their own."""
    views = getattr(config, "per_layer_config", None)
    return config if views is None else views[layer]


def _check_alike(
    layers: Sequence[nn.Module],
    heads: Sequence[HeadGroup | None],
    neurons: Sequence[NeuronGroup | None],
    path: str,
    name: str,
) -> None:
    """Layers with the same children must have the same kinds of sites: otherwise one was overlooked."""
    alike: dict[tuple[str, ...], int] = {}
    for i, layer in enumerate(layers):
        children = tuple(child for child, _ in layer.named_children())
        if len(children) < 3:  # a layer of one block may be of any kind
            continue
        first = alike.setdefault(children, i)
        for kind, groups in (("heads", heads), ("neurons", neurons)):
            if (groups[i] is None) != (groups[first] is None):
                lacking, other = (i, first) if groups[i] is None else (first, i)
                raise UnsupportedModelError(
                    f"{name}: no {kind} were found in {path}.{lacking}, though {path}.{other} has them"
                )


def _shape(
    heads: Sequence[HeadGroup | None], neurons: Sequence[NeuronGroup | None], hidden: int, vocabulary: int
) -> ModelShape:
    return ModelShape.of_layers(
        heads=[0 if group is None else group.heads for group in heads],
        head_widths=[0 if group is None else group.width for group in heads],
        neurons=[0 if group is None else group.site.width for group in neurons],
        experts=[0 if group is None else group.experts for group in neurons],
        expert_widths=[0 if group is None else group.expert_width for group in neurons],
        groups=[[list(sizes) for sizes in group.several] if group else [] for group in neurons],
        hidden=hidden,
        vocabulary=vocabulary,
    )


class _Probe:
    """Passes of a few tokens through the decoder, by which the anatomy is found and proven."""

    def __init__(
        self, decoder: nn.Module, layers: list[nn.Module], owner: nn.Module, hidden: int, name: str
    ) -> None:
        self.decoder, self.layers, self.hidden, self.name = decoder, layers, hidden, name
        self._owner = owner
        self.ids = _ids(decoder)
        self._way: Callable[[], Tensor] | None = None
        self.last: Tensor = torch.empty(0)
        self._inputs: list[Tensor] = []

    @torch.no_grad()
    def run(self) -> Tensor:
        """The decoder's output [1, tokens, hidden] of the probing tokens.

        The first pass finds out how the decoder can be called: with token ids or, where it has no embedding,
        with what an embedding would give; and in some families one module further in.
        """
        if self._way is not None:
            return self._way()
        weight = next(p for p in self.layers[0].parameters() if p.is_floating_point())
        noise = torch.randn(1, TOKENS, self.hidden, generator=torch.Generator().manual_seed(0))
        embeddings = noise.to(self.ids.device, weight.dtype)
        errors: list[Exception] = []
        for decoder in (self.decoder, self._owner):
            for inputs in ({"input_ids": self.ids}, {"inputs_embeds": embeddings}):

                def way(decoder: Any = decoder, inputs: dict[str, Tensor] = inputs) -> Tensor:
                    hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
                    return hidden

                try:
                    output = way()
                except REFUSALS as error:
                    errors.append(error)
                    continue
                self._way, self.decoder = way, decoder
                return output
        raise errors[0]

    def first_pass(self) -> tuple[dict[nn.Module, Call], nn.Module, int]:
        """Run the probing pass.

        Returns: the calls of the layers' modules, the module called after the last layer, and the width of
            the residual stream.
        """
        calls: dict[nn.Module, Call] = {}
        order: list[nn.Module] = []
        inputs: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            order.append(module)
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor):
                calls[module] = Call(len(order), first)
            if module in stack:
                inputs[module] = _first_tensor(args, kwargs)

        try:
            self.run()  # find out which module can be called
        except REFUSALS as error:
            raise UnsupportedModelError(
                f"{self.name}: its language model cannot be run on a few tokens alone ({first_line(error)})"
            ) from None
        stack = set(self.layers)
        inner = [module for layer in self.layers for module in layer.modules()]
        outer = [m for m in self.decoder.children() if not _holds(m, self.layers[-1])]
        handles = [m.register_forward_hook(note, with_kwargs=True) for m in {*inner, *outer}]
        try:
            self.last = self.run()
        finally:
            for handle in handles:
                handle.remove()
        ran = [module for module in order if module in stack]
        if ran != self.layers:
            raise UnsupportedModelError(
                f"{self.name}: its {len(self.layers)} layers did not run once each, in order"
            )
        self._inputs = [inputs[layer] for layer in self.layers]
        last_layer = max(i for i, module in enumerate(order) if module is self.layers[-1])
        after = [m for m in order[last_layer + 1 :] if m in set(outer)]
        width = int(calls[self.layers[-1]].output.shape[-1])
        if len(after) > 1 or self.last.shape[-1] != self.hidden:
            raise UnsupportedModelError(
                f"{self.name}: expected one final norm after the last layer, saw {len(after)}"
            )
        return calls, after[0] if after else nn.Identity(), width

    @contextmanager
    def scrambled(self, seed: int, held: Mapping[nn.Module, Tensor]) -> Iterator[None]:
        """Add noise to every layer's input at all positions but the last, while some outputs are held."""
        generator = torch.Generator().manual_seed(seed)

        def scramble(number: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x = self._inputs[number].clone()
                noise = torch.randn(x[..., :-1, :].shape, generator=generator).to(x)
                x[..., :-1, :] += noise * x.abs().mean()
                if args:
                    return (x, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": x}

            return hook

        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                handle = layer.register_forward_pre_hook(scramble(number), with_kwargs=True)
                stack.callback(handle.remove)
            for module, output in held.items():
                handle = module.register_forward_hook(lambda *_, output=output: output)
                stack.callback(handle.remove)
            yield


def _ids(decoder: nn.Module) -> Tensor:
    """Token ids [1, tokens] that stand for no image, as far as the configuration says."""
    model: Any = decoder
    embedding: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    size = int(getattr(embedding, "num_embeddings", 100))
    device = _device(decoder)
    return ((torch.arange(TOKENS, device=device) * 7 + 5) % size)[None]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def _prove(anatomy: Anatomy, probe: _Probe, name: str) -> None:
    try:
        _prove_experts(anatomy, probe, name)
        _prove_mixing(anatomy, probe, name)
        _prove_edits(anatomy, probe, name)
    except EditError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    _prove_logits(anatomy, probe)


def _prove_mixing(anatomy: Anatomy, probe: _Probe, name: str) -> None:
    """The input of what holds heads depends on other tokens; that of what holds neurons does not.

    Every layer reads what it read before, but with two kinds of noise at all positions except the last. What
    the token mixers write is held, so nothing else can carry the noise to the last position.
    """
    heads = [site for site in anatomy.heads_in if site.width]
    neurons = [site for site in anatomy.neurons_in if site.width]
    written: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        written[module] = output

    handles = [site.module.register_forward_hook(keep) for site in heads]
    try:
        with recording([*heads, *neurons]):
            probe.run()
    finally:
        for handle in handles:
            handle.remove()
    seen = []
    for seed in (1, 2):
        with probe.scrambled(seed, written), recording([*heads, *neurons], slice(-1, None)) as kept:
            probe.run()
        seen.append(kept)
    for site in heads:
        if torch.equal(seen[0][site.name], seen[1][site.name]):
            raise UnsupportedModelError(
                f"{name}: the input of {site.name} depends on no other token, so it does not hold heads"
            )
    for site in neurons:
        first, other = seen[0][site.name], seen[1][site.name]
        # Activations that are not finite pass: passes over examples name them.
        if float((first - other).abs().max()) > ROUNDING[first.dtype] * float(first.abs().max()):
            raise UnsupportedModelError(
                f"{name}: the input of {site.name} depends on other tokens, so it does not hold neurons"
            )


def _device(module: nn.Module) -> torch.device:
    """The device that a module's inputs belong on; the meta device for a model without values."""
    device = next(module.parameters()).device
    return _execution_device(module) if device.type == "meta" and _is_offloaded(module) else device


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads a module's weights when it is called."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def _execution_device(module: nn.Module) -> torch.device:
    """The device that accelerate runs an offloaded module on, whose weights are on the meta device."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def _close(first: Tensor, other: Tensor) -> bool:
    scale = float(first.abs().max())
    return float((first - other).abs().max()) <= ROUNDING[first.dtype] * max(scale, 1e-12)


def _prove_experts(anatomy: Anatomy, probe: _Probe, name: str) -> None:
    """Experts computed with their activations shown give what the model's own computation gives."""
    taps = [site for site in anatomy.neurons_in if isinstance(site.module, NeuronTap)]
    if not taps:
        return
    try:
        with editing([(site, edits.Scaling(torch.ones(site.width))) for site in taps]):
            shown = probe.run()
    except EditError as error:
        raise UnsupportedModelError(
            f"{name}: a forward pass does not call the experts of {taps[0].name}, as with fused kernels "
            f"({first_line(error)}): load it with use_kernels=False and experts_implementation='eager'"
        ) from None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name}: the experts of {taps[0].name} cannot be computed one by one ({first_line(error)}): "
            "load it unquantized, with experts_implementation='eager'"
        ) from None
    if bool(torch.isfinite(probe.last).all()) and not _close(shown, probe.last):
        worst = float((shown - probe.last).abs().max() / probe.last.abs().max())
        raise UnsupportedModelError(
            f"{name}: its experts computed one by one differ from the model's own by {worst:.1e} of the "
            "largest value, so their neurons are not known"
        )


def _prove_edits(anatomy: Anatomy, probe: _Probe, name: str) -> None:
    """Changing a head, and changing the neurons, of the first and last layer must change the logits."""

    def last_logits(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return anatomy.unembed(hidden[:, -1])  # type: ignore[no-any-return]

    base = last_logits(probe.last)
    for kind, sites in (("heads", anatomy.heads_in), ("neurons", anatomy.neurons_in)):
        there = [
            i for i, site in enumerate(sites) if site.width and (kind == "neurons" or _heads(anatomy, i))
        ]
        for layer in {there[0], there[-1]}:
            site = sites[layer]
            part = slice(0, anatomy.shape.head_width_of(layer)) if kind == "heads" else slice(None)
            kept = torch.ones(site.width)
            kept[part] = 0
            with editing([(site, edits.Scaling(kept))]):
                changed = last_logits(probe.run())
            if torch.equal(base, changed):
                raise UnsupportedModelError(
                    f"{name}: zeroing {site.name} changes no logit, so edits there have no effect"
                )


def _heads(anatomy: Anatomy, layer: int) -> int:
    return anatomy.shape.heads_of(layer)


def _prove_logits(anatomy: Anatomy, probe: _Probe) -> None:
    """Compare final norm, unembedding and soft cap with the model's own logits, and choose the last step.

    A model that cannot be run on text alone is not compared here. Replay, patching and the lens compare the
    logits of their first example.
    """
    read: list[Tensor] = []
    module = anatomy.layers[-1] if isinstance(anatomy.final_norm, nn.Identity) else anatomy.final_norm
    outputs: list[Any] = [None] * len(anatomy.layers)
    handles = [_keep_read(module, read, anatomy.layers[-1])]
    for i, layer in enumerate(anatomy.layers):
        handles.append(layer.register_forward_hook(lambda m, a, o, i=i: outputs.__setitem__(i, o)))
    try:
        with torch.no_grad():
            logits: Tensor = anatomy.model(
                input_ids=probe.ids, attention_mask=torch.ones_like(probe.ids), use_cache=False
            ).logits
            if not bool(torch.isfinite(logits).all()):
                return  # nothing can be compared; the first pass names the layer that is not finite
            if _close(logits, anatomy._direct_logits(read[-1])):
                return
    except REFUSALS:
        return
    finally:
        for handle in handles:
            handle.remove()
    step = anatomy._last_step
    try:
        own = _own_last_step(anatomy, outputs, int(probe.ids[0, 0]))
        with torch.no_grad():
            found = own(read[-1])
        if _close(logits, found):
            step.own = own
            return
        reason = "logits computed by its own last step differ"
    except REFUSALS as error:
        reason = first_line(error)
    step.refused = (
        f"{type(anatomy.model).__name__} scales or masks its logits in a way that cannot be repeated for "
        f"other hidden states ({reason})"
    )


def _keep_read(module: nn.Module, read: list[Tensor], last: nn.Module) -> Any:
    if module is last:
        return module.register_forward_hook(
            lambda m, args, output: read.append(output[0] if isinstance(output, tuple) else output)
        )
    return module.register_forward_pre_hook(
        lambda m, args, kwargs: read.append(_first_tensor(args, kwargs)), with_kwargs=True
    )


def _own_last_step(anatomy: Anatomy, outputs: Sequence[Any], token: int) -> Callable[[Tensor], Tensor]:
    """Logits by the model's own forward, in which every layer passes on its input and hidden states are ours.

    Each hidden state is a prompt of one token. This costs an embedding and L calls that do nothing.
    """

    def stub(output: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = _first_tensor(args, kwargs)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return forward

    def own(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.full((len(flat), 1), token, device=flat.device)

        def ours(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((flat, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": flat})

        with ExitStack() as stack:
            for layer, output in zip(anatomy.layers, outputs, strict=True):
                stack.enter_context(replaced_forward(layer, stub(output)))
            handle = anatomy.final_norm.register_forward_pre_hook(ours, with_kwargs=True)
            stack.callback(handle.remove)
            logits: Tensor = anatomy.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    return own
