"""The scope of a steering: the tokens whose activations it scales.

`all` needs nothing: scales act wherever the model computes. For narrower scopes a `ScopeTracker` finds out,
once per forward pass, which tokens the scope names, and edits leave the other tokens as they are. What it has
to know comes from three places: the token ids from the model's own call or, where images enter as embeddings,
from that of the embedding; the number of tokens from the decoder's call; and whether they are the prompt or a
generated token from the key-value cache. A cache that holds tokens already means that the new token was
generated.

Conditions (`hones_eval.core.condition`) are decided in the pass over a prompt, and kept for the tokens that
are generated after it. A direction is read at the input of a layer. If the steering acts on the prompt in an
earlier layer already, the pass is first run up to that layer without the steering; otherwise reading costs
nothing.

Answers that are scored and not generated follow their prompt within one pass. `answer_follows` says how many
of the last tokens are the answer: these count as generated.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.condition import AnyCondition, Condition, TextCondition
from hones_eval.core.experts import Routed
from hones_eval.core.hooks import Edit, Site, editing, uncompiled
from hones_eval.errors import EditError, HonesError

NAMES = ("all", "prompt", "image", "text", "last", "generated")
EVERYTHING = ({"prompt", "generated"}, {"image", "text", "generated"})
"""Scopes that name every token."""


@dataclass(frozen=True)
class Scope:
    """Which tokens a steering acts on.

    Attributes:
        names: any of `all`; `prompt`, all tokens of the prompt; `image`, its image tokens; `text`, its other
            tokens; `last`, its last token; `generated`, the tokens that the model generates.
        positions: tokens of the prompt by position, from 0, without padding; from the end if negative.
        token_ids: sequences of token ids; every occurrence in the prompt is in the scope.

    Several are joined: a token is in the scope if any of them names it.

    Examples:
        >>> Scope.parse("image+last")
        Scope(names=('image', 'last'), positions=(), token_ids=())
    """

    names: tuple[str, ...] = ("all",)
    positions: tuple[int, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Raise HonesError for a name that does not exist, or a scope of nothing."""
        for name in self.names:
            if name not in NAMES:
                near = get_close_matches(name, NAMES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"use {', '.join(NAMES)}, or several with +"
                raise HonesError(f"scope={name!r} is unknown: {hint}")
        if not (self.names or self.positions or self.token_ids):
            raise HonesError(f"the scope is empty: use {', '.join(NAMES)}, or several with +")

    @classmethod
    def parse(cls, text: "str | Scope") -> "Scope":
        """The scope of a text such as `image+last`. Raises: HonesError for an unknown name."""
        if isinstance(text, Scope):
            return text
        if not isinstance(text, str):
            raise HonesError(f"scope={text!r} should be one of {', '.join(NAMES)}, or several with +")
        return cls(tuple(dict.fromkeys(part.strip() for part in text.split("+"))))

    @classmethod
    def at(cls, *positions: int) -> Self:
        """Tokens of the prompt by position, from 0 without padding; from the end if negative."""
        return cls((), tuple(positions))

    @classmethod
    def of_text(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Every occurrence in the prompt of the tokens of a text, encoded alone without special tokens."""
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise HonesError(f"the scope's text {text!r} has no tokens")
        return cls((), (), (tuple(ids),))

    @property
    def is_all(self) -> bool:
        """Whether every token is in the scope."""
        return "all" in self.names or any(names <= set(self.names) for names in EVERYTHING)

    @property
    def acts_on_prompt(self) -> bool:
        """Whether tokens of the prompt can be in the scope."""
        return self != Scope(("generated",))

    def __str__(self) -> str:
        """As in `scope=`, with positions and token ids in brackets."""
        others = [str(list(part)) for part in ([self.positions] if self.positions else [])]
        return "+".join([*self.names, *others, *(f"tokens {list(ids)}" for ids in self.token_ids)])


_ANSWERS: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()


@contextmanager
def answer_follows(model: nn.Module, count: int) -> Iterator[None]:
    """Count the last `count` tokens of forward passes within the block as generated."""
    before = _ANSWERS.get(model, 0)
    _ANSWERS[model] = count
    try:
        yield
    finally:
        _ANSWERS[model] = before


@dataclass(frozen=True)
class _Call:
    """What a forward pass of a model was given: token ids and attention mask, [rows, tokens] or None."""

    ids: Tensor | None = None
    mask: Tensor | None = None


_NOTHING = _Call()


class _EnoughError(Exception):
    """Ends a pass over a prompt whose conditions are decided."""


_READING: "WeakSet[nn.Module]" = WeakSet()
"""Models that are running a prompt only to decide a condition: no tracked edit acts meanwhile."""
_readings = [0]
"""How many they are: a set of weak references is too slow to ask at every module of every token."""


class ScopeTracker:
    """Follows a model's forward passes, and knows which of their tokens a steering acts on."""

    def __init__(
        self,
        anatomy: Anatomy,
        scope: Scope,
        conditions: Sequence[AnyCondition] = (),
        first_layer: int = 0,
        first_in_prompt: int | None = None,
    ) -> None:
        """Track `scope` in the model of `anatomy` from `attach` to `detach`.

        Args:
            anatomy: of the model.
            scope: the tokens in question.
            conditions: which all have to hold for a prompt; for other prompts no token is acted on.
            first_layer: the first layer in which a steering acts. Conditions that are read later need a pass
                of their own.
            first_in_prompt: the first layer in which one acts on tokens of the prompt, if another one.

        Raises: HonesError for an encoder-decoder, whose decoder sees no token of the prompt, or for a
            condition where there is no residual stream to read.
        """
        self._what = (
            f"scope={scope}" if not conditions else f"condition={'+'.join(c.name for c in conditions)}"
        )
        if anatomy.is_encoder_decoder:
            raise HonesError(
                f"{self._what}: the decoder of {type(anatomy.model).__name__} sees no token of the prompt, "
                f"which its encoder reads: {'leave it out' if conditions else 'use scope=all'}"
            )
        self._model, self._decoder, self.scope = anatomy.model, anatomy.decoder, scope
        self._on_generated = scope.is_all or "generated" in scope.names
        self._texts = [c for c in conditions if isinstance(c, TextCondition)]
        self._directions = [c for c in conditions if isinstance(c, Condition)]
        for condition in self._directions:
            condition.check_fits(anatomy.shape, type(anatomy.model).__name__)
            if not anatomy.one_stream:
                anatomy.check_plain_streams()
        self._needs_ids = bool(self._texts or scope.token_ids or {"image", "text"} & set(scope.names))
        self._layers = anatomy.layers
        last_read = max((c.layer for c in self._directions), default=-1)
        self._reads_first = last_read > first_layer
        self._reads_prompt_first = last_read > (first_layer if first_in_prompt is None else first_in_prompt)
        self._rows: Tensor | None = None
        """Whether the conditions hold, bool [rows], of the prompts of the last pass over prompts."""
        self._verdict: Tensor | bool = True
        """The same, as one value where it is the same for all rows."""
        self._undecided: dict[int, Tensor] = {}
        """The last token of each prompt, by layer that is still to be read."""
        self.prompts = self.acted = 0
        """How many prompts were decided, and on how many of them the steering acts."""
        self._undo: list[Callable[[], object]] = []
        self._given = _NOTHING
        self._embedded: Tensor | None = None
        self._prepared: Any = None
        """The attention mask as `generate` has it, before it becomes the masks of a static cache."""
        self._acting: Tensor | bool | None = None

    @property
    def acting(self) -> Tensor | bool:
        """The tokens of the current pass to act on: bool [rows, tokens], or one value for all of them.

        Raises: EditError outside of a forward pass of the model.
        """
        if _readings[0] and self._model in _READING:
            return False
        if self._acting is None:
            raise EditError(f"{self._what}: a layer was called outside of the model's forward pass")
        return self._acting

    @property
    def has_conditions(self) -> bool:
        """Whether prompts are decided on."""
        return bool(self._texts or self._directions)

    @property
    def model(self) -> PreTrainedModel:
        """The model that is followed."""
        return self._model

    def attach(self) -> Self:
        """Start to follow the model."""
        model, decoder = self._model, self._decoder
        handles = [
            model.register_forward_pre_hook(self._called, with_kwargs=True),
            decoder.register_forward_pre_hook(self._decodes, with_kwargs=True),
            decoder.register_forward_hook(self._decoded, always_call=True),
        ]
        if self._needs_ids:
            handles.append(model.get_input_embeddings().register_forward_pre_hook(self._embeds))
        handles += [
            self._layers[layer].register_forward_pre_hook(self._reader(layer), with_kwargs=True)
            for layer in {condition.layer for condition in self._directions}
        ]
        self._undo = [handle.remove for handle in handles]
        generating = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate()]
        self._undo += [self._watch_generation(module) for module in generating]
        return self

    def detach(self) -> None:
        """Stop following the model. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self._rows = None
        self._decoded()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _arguments(module, args, kwargs)
        self._given = _Call(given.get("input_ids"), given.get("attention_mask"))
        self._embedded = None

    def _embeds(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # The first embedding of a pass is the prompt's; some models embed single tokens after it.
        if self._embedded is None and args and isinstance(args[0], Tensor) and args[0].ndim == 2:
            self._embedded = args[0]

    def _decodes(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if _readings[0] and self._model in _READING:
            return
        given = _arguments(module, args, kwargs)
        tokens = given.get("inputs_embeds")
        tokens = given.get("input_ids") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            raise EditError(f"{self._what}: {type(module).__name__} was called without tokens")
        size = (tokens.shape[0], tokens.shape[1])
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            self._acting = self._where_decided(self._generated(size[1], past), size)
            return
        ids = _first((self._given.ids, self._embedded, given.get("input_ids")), size)
        mask = _first((self._given.mask, self._prepared, given.get("attention_mask")), size)
        attended = torch.ones(size, dtype=torch.bool) if mask is None else mask.bool().cpu()
        answer = _ANSWERS.get(self._model, 0)
        prompt = attended.clone()
        prompt[:, size[1] - answer :] = False
        found = self._in_prompt(prompt, None if ids is None else ids.cpu())
        if "generated" in self.scope.names:
            found = found | (attended & ~prompt)
        acting = self.scope.is_all or (found.to(tokens.device) if bool(found.any()) else False)
        self._acting = acting
        if self.has_conditions:
            self._decide(module, given, prompt, ids)
            if self._undecided:  # read in this pass, before the first layer in which the steering acts
                return
            self._acting = self._where_decided(acting, size)

    def _decide(
        self, decoder: nn.Module, given: Mapping[str, Any], prompt: Tensor, ids: Tensor | None
    ) -> None:
        """Decide conditions on texts, and prepare those on directions, or decide them by a pass of their own.

        Args:
            decoder: which is about to be called.
            given: its arguments.
            prompt: which tokens are the prompt's, bool [rows, tokens].
            ids: token ids [rows, tokens], if known.
        """
        rows = torch.ones(len(prompt), dtype=torch.bool)
        if self._texts:
            known = self._known(None if ids is None else ids.cpu())
            image = self._images(prompt, known, needed=False)
            prompts = [row[own].tolist() for row, own in zip(known, prompt & ~image, strict=True)]
            for text in self._texts:
                rows &= text.holds(prompts)
        self._rows = rows
        last = prompt.long().cumsum(1).argmax(1)
        self._undecided = {condition.layer: last for condition in self._directions}
        if not self._undecided:
            self._finish_deciding()
        elif self._reads_first if _ANSWERS.get(self._model) else self._reads_prompt_first:
            call = {name: _copied(x) for name, x in given.items()}
            _READING.add(self._model)
            _readings[0] += 1
            try:
                with torch.no_grad(), uncompiled():
                    decoder(**call)
            except _EnoughError:
                pass
            finally:
                _readings[0] -= 1
                _READING.discard(self._model)

    def _reader(self, layer: int) -> Callable[..., None]:
        """A hook that decides the conditions on the input of a layer."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            last = self._undecided.pop(layer, None)
            if last is None or self._rows is None:
                return
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or len(hidden) != len(last):
                raise EditError(f"{self._what}: layer {layer} was not called with its residual stream")
            own = hidden.detach()[torch.arange(len(last), device=hidden.device), last.to(hidden.device)]
            for condition in self._directions:
                if condition.layer == layer:
                    self._rows = self._rows & condition.holds(own).cpu()
            if self._undecided:
                return
            self._finish_deciding()
            if self._model in _READING:
                raise _EnoughError
            assert self._acting is not None
            self._acting = self._where_decided(self._acting, (int(hidden.shape[0]), int(hidden.shape[1])))

        return read

    def _finish_deciding(self) -> None:
        """Count the prompts, and act only where the conditions hold."""
        assert self._rows is not None
        self.prompts += len(self._rows)
        self.acted += int(self._rows.sum())
        every = bool(self._rows.all())
        self._verdict = every if every or not bool(self._rows.any()) else self._rows

    def _where_decided(self, acting: Tensor | bool, size: tuple[int, int]) -> Tensor | bool:
        """Of the tokens in the scope, those whose prompt meets the conditions."""
        rows, verdict = self._rows, self._verdict
        if rows is None or acting is False:
            return acting
        if len(rows) != size[0]:
            raise EditError(
                f"{self._what}: {size[0]} rows follow {len(rows)} prompts, so it is not known which of them "
                "the condition holds for"
            )
        if isinstance(verdict, bool):
            return acting if verdict else False
        own = rows[:, None].expand(*size)
        return own if acting is True else acting & own.to(acting.device)

    def _decoded(self, *_: Any) -> None:
        if self._model in _READING:
            return
        self._given = _NOTHING
        self._acting = self._embedded = self._prepared = None
        self._undecided = {}

    def _generated(self, tokens: int, past: int) -> bool:
        """Whether tokens that follow a cache of `past` tokens are in the scope."""
        if tokens > 1:
            raise HonesError(
                f"{self._what}: {tokens} tokens were given after a cache of {past}, so prompt and "
                "answer are not known apart: generate without prefill chunks or an assistant model"
            )
        return self._on_generated

    def _in_prompt(self, prompt: Tensor, ids: Tensor | None) -> Tensor:
        """The tokens of a prompt in the scope, bool [rows, tokens], given which tokens are the prompt's."""
        scope, found = self.scope, torch.zeros_like(prompt)
        place = prompt.long().cumsum(1) - 1
        count = prompt.long().sum(1, keepdim=True)
        for name in scope.names:
            if name == "prompt":
                found |= prompt
            elif name == "last":
                found |= prompt & (place == count - 1)
            elif name in ("image", "text"):
                image = self._images(prompt, ids, needed=name == "image")
                found |= prompt & (image if name == "image" else ~image)
        for position in scope.positions:
            if not -int(count.min()) <= position < int(count.min()):
                raise HonesError(f"scope: there is no token {position} in a prompt of {int(count.min())}")
            found |= prompt & (place == (position if position >= 0 else count + position))
        for sequence in scope.token_ids:
            found |= prompt & _occurrences(self._known(ids), sequence)
        return found

    def _images(self, prompt: Tensor, ids: Tensor | None, *, needed: bool) -> Tensor:
        """The image tokens of a prompt. Raises: HonesError where a row has none and they are needed."""
        config = self._model.config
        tokens = [getattr(config, key, None) for key in ("image_token_id", "image_token_index")]
        token = next((token for token in tokens if token is not None), None)
        if token is None:
            if needed:
                raise HonesError(f"scope=image: {type(self._model).__name__} reads no image tokens")
            return torch.zeros_like(prompt)
        image: Tensor = (self._known(ids) == token) & prompt
        missing = (~image.any(1)).nonzero().flatten().tolist()
        if needed and missing:
            raise HonesError(
                f"scope=image: row {missing[0]} of {len(prompt)} has no image: use scope=text or prompt, or "
                "leave questions without images out"
            )
        return image

    def _known(self, ids: Tensor | None) -> Tensor:
        if ids is None:
            raise HonesError(
                f"{self._what}: the token ids of this pass are unknown, as the model was called with "
                "embeddings alone; use scope=prompt, last, generated or all, and no condition on texts"
            )
        return ids

    def _watch_generation(self, model: PreTrainedModel) -> Callable[[], object]:
        """Keep masks, and refuse generation without a cache, where every step looks like a prompt."""
        name = "prepare_inputs_for_generation"
        prepare: Callable[..., Any] = model.prepare_inputs_for_generation  # type: ignore[assignment]

        @wraps(prepare)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("use_cache") is False:
                raise HonesError(f"{self._what} needs the key-value cache: use_cache=True")
            self._prepared = kwargs.get("attention_mask")
            return prepare(*args, **kwargs)

        # Trackers may stop in any order: one that is inside of another's function goes when that one goes.
        attributes: dict[str, Any] = vars(model)
        state = {"below": attributes.get(name), "done": False}
        checked.__dict__["_scope_tracker"] = state
        attributes[name] = checked

        def undo() -> None:
            state["done"] = True
            while (top := attributes.get(name)) is not None:
                own = vars(top).get("_scope_tracker") if hasattr(top, "__dict__") else None
                if own is None or not own["done"]:
                    return
                if own["below"] is None:
                    del attributes[name]
                else:
                    attributes[name] = own["below"]

        return undo


@contextmanager
def editing_in(
    tracker: ScopeTracker | None, edits: Sequence[tuple[Site, Edit]], answer: int = 0
) -> Iterator[None]:
    """Attach edits for the length of a `with` block, at the tokens in a scope; None is every token.

    The last `answer` tokens of a pass within the block are an answer's.
    """
    if tracker is None or not edits:
        with editing(edits):
            yield
        return
    scoped = [(site, Scoped(edit, tracker, site.name)) for site, edit in edits]
    tracker.attach()
    try:
        with answer_follows(tracker.model, answer), editing(scoped):
            yield
    finally:
        tracker.detach()


class Scoped:
    """An edit that acts on the tokens in a scope alone."""

    def __init__(self, edit: Edit, tracker: ScopeTracker, name: str) -> None:
        """Apply `edit` to the input of the module called `name` where `tracker` says so."""
        self._edit, self._tracker, self._name = edit, tracker, name
        self.is_safe = getattr(edit, "is_safe", False)
        if hasattr(edit, "routed"):
            self.routed = self._routed

    def __call__(self, x: Tensor) -> Tensor:
        """Edit the tokens in the scope of an input [..., features]."""
        # Compiled code leaves out what depends on the tokens. Where nothing is compiled, leaving the compiler
        # out would cost more at every generated token than all the rest of this method.
        return self._uncompiled(x) if torch.compiler.is_compiling() else self._edited(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self._edited(x)

    def _edited(self, x: Tensor) -> Tensor:
        acting = self._tracker.acting
        if acting is False:
            return x
        return self._edit(x) if acting is True else self._in_scope(x, acting)

    def _in_scope(self, x: Tensor, acting: Tensor) -> Tensor:
        if acting.numel() != x.shape[:-1].numel():
            raise EditError(
                f"{self._name} was called on {x.shape[:-1].numel()} tokens, where the model's pass has "
                f"{acting.numel()}, so scope={self._tracker.scope} cannot be applied"
            )
        inside = acting.to(x.device).reshape(*x.shape[:-1], 1)
        return torch.where(inside, self._edit(x), x)

    def _routed(self, part: Routed) -> Tensor:
        """Edit the activations of routed tokens in the scope."""
        edit: Any = self._edit
        acting = self._tracker.acting
        if isinstance(acting, bool):
            return edit.routed(part) if acting else part.values
        inside = acting.to(part.values.device)[part.rows, part.positions, None]
        return torch.where(inside, edit.routed(part), part.values)


def _arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _copied(x: Any) -> Any:
    """A decoder's argument for a pass of its own: a copy of a key-value cache, and others as they are.

    The cache of a prompt is usually empty, and its layers hold nothing that a pass would change in place.
    """
    if not hasattr(x, "get_seq_length"):
        return x
    layers = getattr(x, "layers", [])
    held = [value for layer in layers for value in vars(layer).values()]
    if type(x) is not DynamicCache or any(isinstance(value, Tensor | list | dict) for value in held):
        return copy.deepcopy(x)
    own = copy.copy(x)
    own.layers = [copy.copy(layer) for layer in layers]
    return own


def _first(tensors: Sequence[Any], size: tuple[int, int]) -> Tensor | None:
    """The first tensor [rows, tokens] of a size, repeated where every row became several beams."""
    for x in tensors:
        if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == size[1] and size[0] % len(x) == 0:
            return x.repeat_interleave(size[0] // len(x), dim=0)
    return None


def _occurrences(ids: Tensor, sequence: Sequence[int]) -> Tensor:
    """Where a sequence of tokens occurs in rows of ids, bool [rows, tokens]."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    length = len(sequence)
    for start in range(ids.shape[1] - length + 1):
        here = (ids[:, start : start + length] == torch.tensor(sequence)).all(1)
        found[here, start : start + length] = True
    return found
