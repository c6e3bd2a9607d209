"""The anatomy of a Hugging Face vision-language model: its heads, neurons, unembedding and image tokens.

There is no list of model classes or module names. The decoder comes from `get_decoder()`, the parts of its
layers from their structure (see `hones_eval.core.structure`), and experiments prove what was found before
anything relies on it: what holds heads must depend on other tokens and what holds neurons must not, an edit
of every kind of site must change the logits, and logits computed from hidden states must be the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core import edits
from hones_eval.core.adapters import effective_weight, has_adapter
from hones_eval.core.artifact import ModelShape
from hones_eval.core.experts import NeuronPart, NeuronTap
from hones_eval.core.hooks import Site, editing, recording, uncompiled
from hones_eval.core.last_step import ROUNDING as ROUNDING
from hones_eval.core.last_step import LastStep, Stack, close, prove_last_step
from hones_eval.core.offloading import device_of, in_memory, is_offloaded
from hones_eval.core.probing import LayerAt, Probe, decoder_layers
from hones_eval.core.structure import (
    HeadGroup,
    LayerParts,
    NeuronGroup,
    calls_by_registration,
    layer_parts,
)
from hones_eval.core.unwrapping import unwrapped
from hones_eval.errors import EditError, HonesError, UnsupportedModelError, first_line


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a model that scoring, replay and steering need.

    `layers`, `heads_in` and `neurons_in` have one entry per decoder layer of the language model: the layer,
    and the modules whose inputs hold the heads and the neurons. That is the linear layer through which
    attention or another token mixer writes into the residual stream (`o_proj` in most families), and the
    FFN's down projection (`down_proj`) or, in a mixture of experts, a `NeuronTap`. A layer without heads or
    neurons has a site of width 0 there; `shape` says how many each layer has.

    A decoder layer that attends twice counts as two layers: one has the heads of its self-attention, the next
    one those of its cross-attention, and the neurons. `layers` then has the decoder layer twice. This is so
    in encoder-decoders, where all layers are of the decoder.

    `attentions` and `ffns` are modules whose outputs are what these write. Where FFN and experts are no
    module of their own, `ffns` has the layer itself.

    Where `one_stream` is false the hidden states that layers pass on are several residual streams, or the
    last layer's output is merged with earlier ones before the final norm. `token_dim` is their dimension of
    tokens.

    `reads_states` is true where the decoder attends to states that are not in its own sequence, those of an
    encoder or an image.
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
    reads_states: bool = False
    token_dim: int = 1
    one_stream: bool = True
    _last_step: LastStep = field(default_factory=LastStep)

    @classmethod
    def of(cls, model: nn.Module) -> "Anatomy":
        """Find the anatomy of a model and prove it by experiments.

        On the meta device only the structure is found: there are no values to experiment with.

        Raises: UnsupportedModelError, which names the model and the reason.
        """
        if isinstance(known := getattr(model, "anatomy", None), cls):  # what `hones_eval.load` returns
            return known
        with uncompiled():  # compiled code may bypass the hooks of the experiments
            return cls._found_in(unwrapped(model))

    @classmethod
    def _found_in(cls, model: PreTrainedModel) -> "Anatomy":
        name = type(model).__name__
        model = _answering(model)
        decoder = _decoder(model, name)
        config: Any = decoder.config
        layers = decoder_layers(decoder, config, name)
        unembed = unembedding_of(model)
        if unembed is None:
            raise UnsupportedModelError(f"{name} has no unembedding (get_output_embeddings() gives None)")
        vocabulary, hidden = (int(size) for size in unembed.weight.shape)
        probe, final_norm, width, token_dim, one_stream = None, nn.Module(), hidden, 1, True
        if unembed.weight.is_meta and not is_offloaded(model):
            calls = calls_by_registration([layer.module for layer in layers])
        else:
            probe = Probe(decoder, layers, unembed, hidden, name)
            layers, calls, final_norm, width, token_dim, one_stream = probe.first_pass()
            decoder = probe.decoder
        found = [
            layer_parts(layer.module, layer.path.lstrip("."), width, calls, _of_layer(config, i), name)
            for i, layer in enumerate(layers)
        ]
        _check_alike(layers, found, name)
        slots = [
            _Slot(at.module, *parts) for at, several in zip(layers, found, strict=True) for parts in several
        ]
        heads, neurons = [slot.heads for slot in slots], [slot.neurons for slot in slots]
        if not any(heads) or not any(neurons):
            kind = "heads" if not any(heads) else "neurons"
            path = layers[-1].path.rpartition(".")[0]
            raise UnsupportedModelError(f"{name}: no layer of {path} has {kind} that could be found")
        anatomy = cls(
            model=model,
            decoder=decoder,
            layers=[slot.layer for slot in slots],
            heads_in=[NOTHING if group is None else group.site for group in heads],
            neurons_in=[NOTHING if group is None else group.site for group in neurons],
            attentions=[slot.layer if slot.heads is None else slot.heads.attention for slot in slots],
            ffns=[slot.layer if slot.neurons is None else slot.neurons.ffn for slot in slots],
            final_norm=final_norm,
            unembed=unembed,
            soft_cap=getattr(config, "final_logit_softcapping", None),
            shape=_shape(heads, neurons, width, vocabulary),
            reads_states=len(slots) > len(layers) if probe is None else probe.attends_to_states(),
            token_dim=token_dim,
            one_stream=one_stream,
        )
        if probe is not None:
            _prove(anatomy, probe, name)
        return anatomy

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts are read by an encoder, and the layers are those of a decoder."""
        return bool(getattr(self.decoder.config, "is_encoder_decoder", False)) or bool(
            getattr(self.model.config, "is_encoder_decoder", False)
        )

    @property
    def stages(self) -> list[range]:
        """The layers of the anatomy by decoder layer: more than one where a decoder layer attends twice."""
        stages: list[range] = []
        for i, layer in enumerate(self.layers):
            if i and layer is self.layers[i - 1]:
                stages[-1] = range(stages[-1].start, i + 1)
            else:
                stages.append(range(i, i + 1))
        return stages

    def stage_of(self, layer: int) -> range:
        """The layers of the anatomy that belong to the same decoder layer as `layer`."""
        return next(stage for stage in self.stages if layer in stage)

    @property
    def unembedding(self) -> Tensor:
        """The unembedding matrix `U` [vocabulary, hidden], tied to the embedding or not."""
        return in_memory(self.unembed, lambda unembed: unembed.weight)

    @property
    def device(self) -> torch.device:
        """The device on which the logits are computed."""
        return device_of(self.unembed)

    def down_weight(self, layer: int) -> Tensor:
        """What the neurons of a layer write, `W_down` [hidden, neurons], with zeros for neurons it lacks.

        The adapter of a layer is part of it.
        """
        site = self.neurons_in[layer]
        if not site.width:
            weight = self.unembed.weight
            return torch.zeros(self.shape.hidden, self.shape.neurons, dtype=weight.dtype, device=self.device)
        module = site.module
        if has_adapter(module):
            return self.padded(effective_weight(module, site.width))
        weights = (
            [_written_by(part) for part in module.parts]
            if isinstance(module, NeuronTap)
            else [in_memory(module, lambda linear: linear.weight)]
        )
        if not all(isinstance(weight, Tensor) and weight.is_floating_point() for weight in weights):
            raise HonesError(f"{site.name} is quantized: its neurons' write directions cannot be read")
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
        return self.padded(weight)

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

    def head_shift_features(self, shifts: Tensor, layer: int) -> Tensor:
        """Vectors per head [H, head width] as one number per input feature [width] of a layer's head site."""
        shape, width = self.shape, self.heads_in[layer].width
        if not shape.heads_of(layer):
            return shifts.new_zeros(width)
        return shifts[: shape.heads_of(layer), : shape.head_width_of(layer)].reshape(-1)

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

    def last_logits(self, hidden: Tensor, read: slice) -> Tensor:
        """Logits [rows, read, vocabulary] of some positions of the last layer's output.

        Raises: HonesError when the model merges its residual streams in a way that cannot be repeated.
        """
        if self.one_stream:
            return self.logits(hidden[:, read])
        if self._last_step.merged is None:
            raise HonesError("the last layer's output alone does not give its logits")
        return self._last_step.merged(hidden[(slice(None),) * self.token_dim + (read,)])

    def check_plain_streams(self) -> None:
        """Raise HonesError when the decoder reads images by cross-attention, or has several streams."""
        if not self.one_stream:
            raise HonesError(
                f"{type(self.model).__name__} has several residual streams, or mixes earlier layers into the "
                "last one: tracing and lens read one stream per layer and do not work with it"
            )
        if self.reads_states:
            raise HonesError(
                f"{type(self.model).__name__} reads images by cross-attention, so no token of its decoder is "
                "an image token: tracing, lens and other methods by image positions do not work with it"
            )

    def image_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Whether each position is an image token: bool [batch, tokens], by the image token id.

        Raises: HonesError when images are read by cross-attention, when the configuration names no image
            token, or when none is in the input.
        """
        if self.reads_states:
            self.check_plain_streams()
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


class _Slot(NamedTuple):
    """One layer of the anatomy: a decoder layer, and the heads and neurons of it that belong here."""

    layer: nn.Module
    heads: HeadGroup | None
    neurons: NeuronGroup | None


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


def _written_by(part: NeuronPart) -> Tensor:
    """What the neurons of a part of a layer write [hidden, width]; the adapter of a linear layer included."""
    if not part.experts and has_adapter(part.module):
        return effective_weight(part.module, part.width)
    return part.down_weight()


def unembedding_of(model: PreTrainedModel) -> Any:
    """The unembedding of a model, or of the language model inside a model that does not pass it on."""
    parts = [model, *(part for part in model.modules() if isinstance(part, PreTrainedModel))]
    return next((u for part in parts if (u := part.get_output_embeddings()) is not None), None)


def _decoder(model: PreTrainedModel, name: str) -> nn.Module:
    decoder = model.get_decoder()
    if decoder is None or not hasattr(decoder, "config"):
        raise UnsupportedModelError(f"{name}: get_decoder() gives no language model")
    # Causal language models inside a vision-language model keep their layers one level down.
    while (inner := decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder) is not decoder:
        decoder = inner
    return decoder  # type: ignore[no-any-return]


def _of_layer(config: Any, layer: int) -> Any:
    """The configuration of one layer, in families whose layers have settings of their own."""
    views = getattr(config, "per_layer_config", None)
    return config if views is None or layer >= len(views) else views[layer]


def _check_alike(layers: Sequence[LayerAt], found: Sequence[Sequence[LayerParts]], name: str) -> None:
    """Layers with the same children must have the same kinds of sites: otherwise one was overlooked."""
    alike: dict[tuple[str, ...], int] = {}
    for i, (path, layer) in enumerate(layers):
        children = tuple(child for child, _ in layer.named_children())
        if len(children) < 3:  # a layer of one block may be of any kind
            continue
        first = alike.setdefault(children, i)
        for kind in ("heads", "neurons"):
            here, there = (sum(getattr(p, kind) is not None for p in found[j]) for j in (i, first))
            if here != there:
                lacking, other = (path, layers[first].path) if here < there else (layers[first].path, path)
                raise UnsupportedModelError(
                    f"{name}: no {kind} were found in {lacking}, though {other} has them"
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


def _prove(anatomy: Anatomy, probe: Probe, name: str) -> None:
    try:
        _prove_experts(anatomy, probe, name)
        _prove_mixing(anatomy, probe, name)
        _prove_edits(anatomy, probe, name)
    except EditError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    stack = Stack(
        anatomy.model,
        anatomy.layers,
        anatomy.final_norm,
        anatomy.unembed,
        anatomy._direct_logits,
        anatomy.token_dim,
        anatomy.one_stream,
    )
    vars(anatomy._last_step).update(vars(prove_last_step(stack, probe)))


def _prove_mixing(anatomy: Anatomy, probe: Probe, name: str) -> None:
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


def _prove_experts(anatomy: Anatomy, probe: Probe, name: str) -> None:
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
    if bool(torch.isfinite(probe.last).all()) and not close(shown, probe.last):
        worst = float((shown - probe.last).abs().max() / probe.last.abs().max())
        raise UnsupportedModelError(
            f"{name}: its experts computed one by one differ from the model's own by {worst:.1e} of the "
            "largest value, so their neurons are not known"
        )


def _prove_edits(anatomy: Anatomy, probe: Probe, name: str) -> None:
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
