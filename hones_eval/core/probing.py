"""Find the decoder layers of a model, and run them on a few tokens to learn what they do.

A `Probe` calls the decoder alone: with token ids or, where it has no embedding, with what an embedding would
give, and with states to attend to where its layers have cross-attention. Its first pass learns the order in
which modules are called, which `hones_eval.core.structure` needs. Its later passes are experiments: they run
with noise at every position but the last, or with other states to attend to.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.offloading import device_of
from hones_eval.core.structure import Call, mixes_tokens
from hones_eval.errors import UnsupportedModelError, first_line

# Errors by which a model refuses a pass over text alone, or a layer a call that it does not expect.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
TOKENS = 5
# Parameters by which decoders receive the states [batch, tokens, width] that they attend to.
STATES = ("encoder_hidden_states", "cross_attention_states")
# As states, but [batch, images, tokens, width], with a mask [batch, text tokens, images].
IMAGE_STATES, IMAGE_MASK = "image_encoder_embeddings", "image_attention_mask"
STATE_TOKENS = 3


class LayerAt(NamedTuple):
    """A decoder layer, and where it is in the decoder."""

    path: str
    module: nn.Module


def decoder_layers(decoder: nn.Module, config: Any, name: str) -> list[LayerAt]:
    """The decoder's layers, those of lists beside the main one included (cross-attention in IDEFICS).

    Lists beside the main one are spread evenly over it, each of their layers before the main one's. The
    probing pass finds the true order, and leaves out lists that do not run.

    Raises: UnsupportedModelError when there is not one main list of layers.
    """
    counts = (getattr(config, key, None) for key in _depth_names(config))
    count = next((int(count) for count in counts if count is not None), None)
    if count is None:
        raise UnsupportedModelError(
            f"{name}: the configuration of {type(decoder).__name__} ({config.model_type}) states no number "
            "of layers, so it is not one decoder stack that answers token by token"
        )
    lists = [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _inside_layers(path)
    ]
    main = [(path, module) for path, module in lists if len(module) == count]
    if len(main) > 1 and all(_is_stack(module) for _, module in main):
        main = main[:1]
    if len(main) != 1:
        raise UnsupportedModelError(
            f"{name}: looked in {type(decoder).__name__} for one list of {count} layers, found {len(main)}"
        )
    (path, stack), parent = main[0], main[0][0].rpartition(".")[0]
    beside = [
        (other, module)
        for other, module in lists
        if module is not stack and other.rpartition(".")[0] == parent and count % len(module) == 0
        if _is_stack(module)
    ]
    placed = [(float(i), LayerAt(f"{path}.{i}", layer)) for i, layer in enumerate(stack)]
    for other, module in beside:
        every = count // len(module)
        placed += [(i * every - 0.5, LayerAt(f"{other}.{i}", layer)) for i, layer in enumerate(module)]
    return [layer for _, layer in sorted(placed, key=lambda item: item[0])]


def _depth_names(config: Any) -> tuple[str, ...]:
    """Names of the number of decoder layers; in an encoder-decoder the last one may be the encoder's."""
    if getattr(config, "is_encoder_decoder", False):
        return "num_decoder_layers", "decoder_layers", "num_hidden_layers"
    return ("num_hidden_layers",)


def _is_stack(layers: nn.ModuleList) -> bool:
    return all(mixes_tokens(layer) for layer in layers)


def _inside_layers(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


class FirstPass(NamedTuple):
    """What the first pass learns.

    `layers` are in the order in which they run, `calls` those of their modules. `width` is the number of
    features that blocks write into the residual stream, `token_dim` the dimension of tokens in the hidden
    states that layers receive, which follows that of the batch. With `one_stream` these are one residual
    stream, of which the final norm reads the last; other models have several streams and merge them, or read
    earlier layers once more.
    """

    layers: list[LayerAt]
    calls: dict[nn.Module, Call]
    final_norm: nn.Module
    width: int
    token_dim: int
    one_stream: bool


class Probe:
    """Passes of a few tokens through the decoder, by which the anatomy is found and proven."""

    def __init__(
        self, decoder: nn.Module, layers: list[LayerAt], unembed: nn.Module, hidden: int, name: str
    ) -> None:
        """Probe a decoder whose unembedding reads `hidden` features; `name` is the model's."""
        self.decoder, self.hidden, self.name = decoder, hidden, name
        self.layers = [layer.module for layer in layers]
        self.ids = token_ids(decoder)
        self.last: Tensor = torch.empty(0)
        """The decoder's output [1, tokens, hidden] in the first pass."""
        self.states: dict[str, Tensor] = {}
        """What the decoder is given to attend to, by parameter."""
        list_path = layers[-1].path.rpartition(".")[0]
        self._owner = decoder.get_submodule(list_path.rpartition(".")[0])
        self._placed, self._unembed = layers, unembed
        self._inputs: dict[nn.Module, Tensor] = {}
        self._text: dict[str, Tensor] | None = None
        self._gives_logits = False

    @torch.no_grad()
    def run(self) -> Tensor:
        """The decoder's output [1, tokens, hidden] of the probing tokens.

        The first pass finds out how the decoder can be called, and in some families calls a module further
        in.
        """
        if self._text is not None:
            return self._call(self.decoder, self._text, self.states)
        weight = next(p for p in self.layers[0].parameters() if p.is_floating_point())
        noise = torch.randn(1, TOKENS, self.hidden, generator=torch.Generator().manual_seed(0))
        embeddings = noise.to(self.ids.device, weight.dtype)
        errors: list[Exception] = []
        texts = {"input_ids": self.ids}, {"inputs_embeds": embeddings}
        decoders = dict.fromkeys((self.decoder, self._owner))
        for gives_logits, decoder, text in itertools.product((False, True), decoders, texts):
            for states in self._possible_states(decoder, weight.dtype):
                try:
                    self._gives_logits = gives_logits
                    output = self._call(decoder, text, states)
                except REFUSALS as error:
                    errors.append(error)
                    continue
                self.decoder, self._text, self.states = decoder, text, states
                return output
        raise errors[0]

    def _call(self, decoder: nn.Module, text: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Tensor:
        """The decoder's hidden states; those that its unembedding reads, where it returns logits alone."""
        if not self._gives_logits:
            hidden: Tensor = decoder(**text, **states, use_cache=False).last_hidden_state
            return hidden
        read: list[Tensor] = []
        handle = self._unembed.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            decoder(**text, **states, use_cache=False)
        finally:
            handle.remove()
        return read[-1]

    def _possible_states(self, decoder: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
        """States that a decoder may want to attend to, in every width that its layers read; then none."""
        parameters = inspect.signature(type(decoder).forward).parameters
        device = self.ids.device
        reads = {getattr(m, "in_features", None) for layer in self.layers for m in layer.modules()}
        widths = dict.fromkeys([self.hidden, *sorted(w for w in reads if isinstance(w, int))])
        for width in widths:
            noise = torch.randn(1, STATE_TOKENS, width, generator=torch.Generator().manual_seed(1))
            noise = noise.to(device, dtype)
            yield from ({name: noise} for name in STATES if name in parameters)
            if IMAGE_STATES in parameters:
                mask = torch.ones(1, TOKENS, 1, dtype=torch.long, device=device)
                yield {IMAGE_STATES: noise[:, None], IMAGE_MASK: mask}
        yield {}

    def first_pass(self) -> FirstPass:
        """Run the probing pass; see `FirstPass`."""
        calls: dict[nn.Module, Call] = {}
        order: list[nn.Module] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            order.append(module)
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor):
                calls[module] = Call(len(order), first)
            if module in stack:
                self._inputs[module] = first_tensor(args, kwargs)

        try:
            self.run()  # find out which module can be called
        except REFUSALS as error:
            raise UnsupportedModelError(
                f"{self.name}: its language model cannot be run on a few tokens alone ({first_line(error)})"
            ) from None
        stack = set(self.layers)
        inner = [module for layer in self.layers for module in layer.modules()]
        outer = [m for m in self.decoder.children() if not any(_holds(m, layer) for layer in self.layers)]
        handles = [m.register_forward_hook(note, with_kwargs=True) for m in {*inner, *outer}]
        try:
            self.last = self.run()
        finally:
            for handle in handles:
                handle.remove()
        placed = self._in_order(order)
        last_layer = max(i for i, module in enumerate(order) if module is self.layers[-1])
        after = [m for m in order[last_layer + 1 :] if m in set(outer) and _acts(m, self._unembed)]
        stream = calls[self.layers[-1]].output
        if self.last.shape[-1] != self.hidden or (
            len(after) > 1 and not torch.equal(calls[after[-1]].output, self.last)
        ):
            raise UnsupportedModelError(
                f"{self.name}: expected one final norm after the last layer, saw {len(after)}"
            )
        dim = token_dim(self._inputs[self.layers[-1]], TOKENS)
        final_norm = after[-1] if after else nn.Identity()
        one_stream = stream.ndim == 3 and len(after) <= 1
        return FirstPass(placed, calls, final_norm, self._written(calls, stream), dim, one_stream)

    def _written(self, calls: Mapping[nn.Module, Call], stream: Tensor) -> int:
        """The number of features that linear layers write: the stream, or one of several side by side."""
        width = int(stream.shape[-1])
        if width == self.hidden or width % self.hidden:
            return width
        linear = [call.output.shape[-1] for m, call in calls.items() if hasattr(m, "in_features")]
        return self.hidden if linear.count(self.hidden) > linear.count(width) else width

    def _in_order(self, order: Sequence[nn.Module]) -> list[LayerAt]:
        """The layers in the order in which they ran, without lists of which none ran."""
        ran = [module for module in order if module in set(self.layers)]
        lists_run = {layer.path.rpartition(".")[0] for layer in self._placed if layer.module in set(ran)}
        expected = [layer for layer in self._placed if layer.path.rpartition(".")[0] in lists_run]
        if len(ran) != len(expected) or {*ran} != {layer.module for layer in expected}:
            raise UnsupportedModelError(
                f"{self.name}: its {len(expected)} layers did not run once each, in order"
            )
        for path in lists_run:
            members = [layer.module for layer in expected if layer.path.rpartition(".")[0] == path]
            if [module for module in ran if module in set(members)] != members:
                raise UnsupportedModelError(
                    f"{self.name}: its {len(expected)} layers did not run once each, in order"
                )
        placed = sorted(expected, key=lambda layer: ran.index(layer.module))
        self.layers = [layer.module for layer in placed]
        return placed

    def attends_to_states(self) -> bool:
        """Whether the decoder's output depends on the states that it is given to attend to."""
        if not self.states:
            return False
        with self._other_states(1):
            return not torch.equal(self.run(), self.last)

    @contextmanager
    def _other_states(self, seed: int) -> Iterator[None]:
        before, generator = self.states, torch.Generator().manual_seed(seed)
        self.states = {
            name: x + torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x
            for name, x in before.items()
        }
        try:
            yield
        finally:
            self.states = before

    @contextmanager
    def scrambled(self, seed: int, held: Mapping[nn.Module, Tensor]) -> Iterator[None]:
        """Add noise to every layer's input at all positions but the last, while some outputs are held.

        The states that cross-attention reads get noise, too.
        """
        generator = torch.Generator().manual_seed(seed)

        def scramble(layer: nn.Module) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x = self._inputs[layer].clone()
                early = x.narrow(token_dim(x, TOKENS), 0, TOKENS - 1)
                early += torch.randn(early.shape, generator=generator).to(x) * x.abs().mean()
                if args:
                    return (x, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": x}

            return hook

        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.register_forward_pre_hook(scramble(layer), with_kwargs=True)
                stack.callback(handle.remove)
            for module, output in held.items():
                handle = module.register_forward_hook(lambda *_, output=output: output)
                stack.callback(handle.remove)
            stack.enter_context(self._other_states(seed))
            yield


def token_dim(x: Tensor, tokens: int) -> int:
    """The dimension of tokens in hidden states of one example; it follows the batch's.

    It is 1 for [batch, tokens, hidden] and [batch, tokens, streams, hidden], and 2 for streams that come
    first.
    """
    dims = [d for d in range(1, x.ndim - 1) if x.shape[d] == tokens and x.shape[d - 1] == 1]
    return dims[0] if dims else 1


def _acts(module: nn.Module, unembed: nn.Module) -> bool:
    """Whether a module after the last layer belongs to the last step before the unembedding."""
    return module is not unembed and not isinstance(module, nn.Dropout | nn.Identity)


def token_ids(decoder: nn.Module) -> Tensor:
    """Token ids [1, tokens] that stand for no image, as far as the configuration says."""
    model: Any = decoder
    embedding: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    size = int(getattr(embedding, "num_embeddings", 100))
    return ((torch.arange(TOKENS, device=device_of(decoder)) * 7 + 5) % size)[None]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a layer or a norm is called with."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x
