"""The anatomy of a Hugging Face vision-language model: its heads, neurons, unembedding and image tokens.

There is no list of model classes. The decoder comes from `get_decoder()`, its sizes come from its own
configuration, and an experiment proves what was found: an edit of every kind of site must change the logits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.artifact import ModelShape
from hones_eval.core.hooks import Site, editing, recording
from hones_eval.core.unwrapping import unwrapped
from hones_eval.errors import EditError, HonesError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a model that scoring, replay and steering need.

    `layers`, `heads_in` and `neurons_in` have one entry per decoder layer of the language model: the layer,
    and the two linear layers whose inputs hold the heads (`o_proj`) and the neurons (`down_proj`).
    `attentions` and `ffns` are the modules that directly contain those two linear layers.
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

    @classmethod
    def of(cls, model: nn.Module) -> "Anatomy":
        """Find the anatomy of a model and prove it by an experiment.

        Raises: UnsupportedModelError, which names the model and the reason.
        """
        if isinstance(known := getattr(model, "anatomy", None), cls):  # what `hones_eval.load` returns
            return known
        model = unwrapped(model)
        name = type(model).__name__
        decoder = _decoder(model, name)
        config: Any = decoder.config
        layers, path = _layers(decoder, int(config.num_hidden_layers), name)
        heads_in = [_projection(layer, "o_proj", f"{path}.{i}", name) for i, layer in enumerate(layers)]
        neurons_in = [_projection(layer, "down_proj", f"{path}.{i}", name) for i, layer in enumerate(layers)]
        unembed = model.get_output_embeddings()
        if unembed is None:
            raise UnsupportedModelError(f"{name} has no unembedding (get_output_embeddings() gives None)")
        vocabulary, hidden = unembed.weight.shape
        shape = ModelShape(
            layers=len(layers),
            heads=int(config.num_attention_heads),
            head_width=_head_width(heads_in, config, name),
            hidden=int(hidden),
            neurons=_same_width(neurons_in, "down_proj", name),
            vocabulary=int(vocabulary),
        )
        final_norm = _prove_layers(decoder, layers, heads_in, neurons_in, shape, name)
        soft_cap = getattr(config, "final_logit_softcapping", None)
        anatomy = cls(
            model=model,
            decoder=decoder,
            layers=layers,
            heads_in=heads_in,
            neurons_in=neurons_in,
            attentions=[_holder(layer, site) for layer, site in zip(layers, heads_in, strict=True)],
            ffns=[_holder(layer, site) for layer, site in zip(layers, neurons_in, strict=True)],
            final_norm=final_norm,
            unembed=unembed,
            soft_cap=soft_cap,
            shape=shape,
        )
        anatomy._prove_edits(name)
        return anatomy

    @property
    def unembedding(self) -> Tensor:
        """The unembedding matrix `U` [vocabulary, hidden], tied to the embedding or not."""
        weight: Tensor = self.unembed.weight
        return weight

    def down_weight(self, layer: int) -> Tensor:
        """`W_down` [hidden, neurons] of one layer."""
        weight = self.neurons_in[layer].module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise HonesError(
                f"{self.neurons_in[layer].name} is quantized: its neurons' write directions cannot be read"
            )
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]: final norm, unembedding and soft cap."""
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

    def _prove_edits(self, name: str) -> None:
        """Changing a head, and changing the neurons, of the first and last layer must change the logits."""
        probe = _probe(self.decoder, self.layers[0], self.shape.hidden)

        def last_logits() -> Tensor:
            with torch.no_grad():
                return self.logits(_last_hidden(self.decoder, probe))

        base = last_logits()
        width = self.shape.head_width
        for layer in {0, self.shape.layers - 1}:
            for site, part in (
                (self.heads_in[layer], slice(0, width)),
                (self.neurons_in[layer], slice(None)),
            ):
                with editing([(site, lambda x, part=part: _without(x, part))]):  # type: ignore[misc]
                    changed = last_logits()
                if torch.equal(base, changed):
                    raise UnsupportedModelError(
                        f"{name}: zeroing {site.name} changes no logit, so edits there have no effect"
                    )


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


def _layers(decoder: nn.Module, count: int, name: str) -> tuple[list[nn.Module], str]:
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
    crossed = [i for i, layer in enumerate(stack) if _has_part(layer, "cross_attn")]
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


def _projection(layer: nn.Module, part: str, path: str, name: str) -> Site:
    found = [(inner, m) for inner, m in layer.named_modules() if inner.split(".")[-1] == part]
    # The only down_proj of a mixture of experts may belong to its shared expert, without the routed ones.
    mixture = part == "down_proj" and _has_part(layer, "expert")
    if len(found) == 1 and hasattr(found[0][1], "in_features") and not mixture:
        inner, module = found[0]
        return Site(f"{path}.{inner}", module, int(module.in_features))
    linear = sorted({inner.split(".")[-1] for inner, m in layer.named_modules() if isinstance(m, nn.Linear)})
    reason = f"{len(found)} of them" if found else "none"
    if mixture:
        reason += " (a mixture of experts has no one FFN whose neurons could be ranked)"
    raise UnsupportedModelError(
        f"{name}: looked for one linear layer called {part} in {path}, found {reason}; its linear layers are "
        f"{', '.join(linear)}"
    )


def _holder(layer: nn.Module, site: Site) -> nn.Module:
    return next(m for m in layer.modules() if any(child is site.module for child in m.children()))


def _head_width(heads_in: Iterable[Site], config: Any, name: str) -> int:
    total, heads = _same_width(heads_in, "o_proj", name), int(config.num_attention_heads)
    if total % heads:
        raise UnsupportedModelError(f"{name}: o_proj takes {total} features, not a multiple of {heads} heads")
    stated = getattr(config, "head_dim", None)
    if stated is not None and stated * heads != total:
        raise UnsupportedModelError(
            f"{name}: o_proj takes {total} features, but the configuration says {heads} heads of {stated}"
        )
    return total // heads


def _same_width(sites: Iterable[Site], part: str, name: str) -> int:
    widths = {site.width for site in sites}
    if len(widths) != 1:
        raise UnsupportedModelError(f"{name}: the layers' {part} differ in width: {sorted(widths)}")
    return widths.pop()


def _prove_layers(
    decoder: nn.Module,
    layers: list[nn.Module],
    heads_in: list[Site],
    neurons_in: list[Site],
    shape: ModelShape,
    name: str,
) -> nn.Module:
    """Run five random embeddings through the decoder; return the module called after the last layer."""
    calls: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        calls.append(module)

    watched = list(layers) + [m for m in decoder.children() if not isinstance(m, nn.ModuleList)]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        with torch.no_grad(), recording([*heads_in, *neurons_in]):
            hidden = _last_hidden(decoder, _probe(decoder, layers[0], shape.hidden))
    except EditError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    ran = [module for module in calls if module in layers]
    if ran != layers:
        raise UnsupportedModelError(f"{name}: its {len(layers)} layers did not run once each, in order")
    after = calls[calls.index(layers[-1]) + 1 :]
    if len(after) != 1 or hidden.shape[-1] != shape.hidden:
        raise UnsupportedModelError(f"{name}: expected one final norm after the last layer, saw {len(after)}")
    return after[0]


def _probe(decoder: nn.Module, first: nn.Module, hidden: int) -> Tensor:
    weight = next(p for p in first.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    device = _execution_device(first) if weight.is_meta else weight.device
    return torch.randn(1, 5, hidden, generator=generator).to(device, weight.dtype)


def _execution_device(module: nn.Module) -> torch.device:
    """The device that accelerate runs an offloaded module on, whose weights are on the meta device."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def _last_hidden(decoder: nn.Module, embeddings: Tensor) -> Tensor:
    hidden: Tensor = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return hidden


def _without(x: Tensor, part: slice) -> Tensor:
    edited = x.clone()
    edited[..., part] = 0
    return edited
