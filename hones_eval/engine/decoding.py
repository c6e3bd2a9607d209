"""Greedy answers of one example, unedited and under one edit at a time.

Decoding under every edit from the start would cost one generation per head. Most edits do not change the
answer, and that can be checked without decoding: append the unedited answer to the prompt, replay one pass
under the edit, and compare the greedy choice at every answer position (the end token included) with the
answer. If all agree, decoding under the edit gives the unedited answer. Only edits with a disagreement are
decoded, from their first difference, with the keys and values of the replayed pass (see
`hones_eval.engine.continuation`).

The check is valid only where one pass over prompt and answer gives the logits that `generate` saw. Examples
are tested for this, and are decoded in full under every edit where it fails.

Once it has held for `generate`, two ways to the unedited answer cost less:

- The answer is guessed, and the pass that checks edits also shows whether the guess is right. Where it is
  wrong, decoding continues from its first wrong token, and the result is tested as that of `generate` is.
- Where most edits change the answer, checking them is of no use. Then only the prompt is replayed, and all
  rows are decoded together, the unedited one among them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.scope import editing_in
from hones_eval.engine.branches import AlongTarget, Branching
from hones_eval.engine.continuation import (
    Differing,
    KeptKeys,
    candidates,
    continue_decoding,
    disagreement,
    waiting_rows,
)
from hones_eval.engine.drafts import Drafts
from hones_eval.engine.encoders import encoded_once
from hones_eval.engine.passes import (
    ROUNDING,
    FullPasses,
    NeuronReader,
    Passes,
    RowLimit,
    Rows,
    SiteEdit,
    site_edits,
)
from hones_eval.engine.prompts import ANSWER_IDS, appended, own_tokens, started
from hones_eval.engine.replay import Replay, Replayer
from hones_eval.errors import HonesError, first_line

WORTH_GUESSING = 0.4
"""The share of right guesses above which answers are guessed although decoding cannot continue from them."""
MOST = 0.5
"""The share of changed answers above which edited answers are decoded without being checked."""


class Decoder:
    """Greedy decoding of examples with the model's own `generate`, unedited and under edits."""

    def __init__(self, replayer: Replayer) -> None:
        """Decode with the model that `replayer` replays."""
        self.replayer = replayer
        self.anatomy = replayer.anatomy
        self.answer_type = 0
        self._knows_type = False
        self.continuing: PreTrainedModel | None = None
        """The model that continues answers from their first difference, once it is proven to be exact."""
        self.not_continued: str | None = None
        """Why answers are decoded from the start, where continuing is not exact; else None."""
        self.drafts = Drafts()
        self.guesses: bool | None = None
        """Whether several tokens at once may be passed to `continuing`; None while that is not proven."""
        self.mostly_changed: bool | None = None
        """Whether answers are decoded without being checked; None until `settle`."""
        self._settled = self._explained = self._guesses = self._right = 0
        self.branching = Branching(self.anatomy)

    @torch.no_grad()
    def greedy(
        self,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        likely: Sequence[int] | None = None,
        unchecked: bool = False,
    ) -> "GreedyExample":
        """Decode one example (a batch of one) unedited; see `GreedyExample` for the edited answers.

        Args:
            inputs: of the prompt.
            settings: of `generate`.
            likely: the tokens of an answer that is worth checking before decoding; None not to guess.
            unchecked: whether the answer may be decoded together with the edited ones, where `settle` has
                decided so; it is then known only after `GreedyExample.answers` has started.
        """
        inputs = started(self.anatomy.model, inputs)

        def guessed(plan: _Plan) -> GreedyExample | None:
            if likely is None or not self._may_guess(inputs, plan):
                return None
            if unchecked and self.mostly_changed and own_tokens(inputs).shape[1] <= self._settled:
                return self._undecoded(inputs, settings, plan)
            return self._guessed(inputs, settings, plan, [*likely, *plan.end_tokens[:1]])

        with encoded_once(self.anatomy):
            plan, output = _decoded_by_plan(self.anatomy, inputs, settings, guessed)
            if isinstance(output, GreedyExample):
                example = output
            else:
                tokens: list[int] = output.sequences[0, plan.prompt.shape[1] :].tolist()
                example = GreedyExample(self, inputs, settings, plan, tokens, torch.cat(output.logits))
                if example.passes is not None:
                    self._explained = max(self._explained, own_tokens(inputs).shape[1])
        self.drafts.learn(example.tokens)
        return example

    def _may_guess(self, inputs: Mapping[str, Any], plan: "_Plan") -> bool:
        """Whether one pass is known to give the logits of `generate` for an example like this one.

        It must have done so for a prompt that is at least as long, because windows of attention depend on
        the length. Routing in a mixture of experts depends on rounding, so each example is tested there.
        """
        mask, length = inputs.get("attention_mask"), own_tokens(inputs).shape[1]
        plain = not ({ANSWER_IDS, "token_type_ids"} & inputs.keys()) and not self.anatomy.shape.has_experts
        whole = mask is None or bool(mask.all())
        known = length <= self._explained and self.replayer.inexact is None and self.not_continued is None
        return plain and whole and known and not len(plan.processors)

    def _guessed(
        self, inputs: Mapping[str, Any], settings: Mapping[str, Any], plan: "_Plan", guess: list[int]
    ) -> "GreedyExample | None":
        """Decode by checking a guess, and by continuing from its first wrong token; None where that fails."""
        worth = self._right + 1 >= WORTH_GUESSING * (self._guesses + 2)
        if not guess or (self.continuing is None and not worth):
            return None
        passes = self.record(inputs, guess)
        if not isinstance(passes, Replay) or passes.keys_values is None:
            return None
        chosen: list[int] = passes.base_logits.argmax(-1).tolist()
        place = first_difference(chosen, guess)
        same = len(guess) if place is None else place
        text = torch.cat([plan.prompt, torch.tensor([guess], device=plan.prompt.device)], dim=1)
        ends = [bool(plan.ended(text[:, : plan.prompt.shape[1] + i + 1])) for i in range(same)]
        self._guesses += 1
        self._right += place is None
        if any(ends[: len(guess) - 1]) or near_tie(passes.base_logits[: same + 1]):
            return None
        if place is None:
            return GreedyExample(self, inputs, settings, plan, guess, passes=passes) if ends[-1] else None
        if self.continuing is None:
            return None
        tokens = own_tokens(inputs).shape[1] + place
        row = Differing(None, place, chosen[place], [kept.of_row(0, tokens) for kept in passes.keys_values])
        drafts = self.drafts if self.guesses else None
        continued = continue_decoding(self.continuing, self.anatomy, plan, guess, [row], drafts)
        parts = [passes.base_logits[: place + 1], *([continued.first] if len(continued.first) else [])]
        logits = torch.cat(parts)
        if near_tie(logits):
            return None
        return GreedyExample(self, inputs, settings, plan, continued.answers[0], logits)

    def _undecoded(
        self, inputs: Mapping[str, Any], settings: Mapping[str, Any], plan: "_Plan"
    ) -> "GreedyExample | None":
        """An example whose unedited answer is decoded together with the edited ones."""
        passes = self.record(inputs, [0])  # the last token of an answer is not part of its pass
        if not isinstance(passes, Replay) or passes.keys_values is None or near_tie(passes.base_logits):
            return None
        first = [int(passes.base_logits[0].argmax())]
        return GreedyExample(self, inputs, settings, plan, first, passes=passes, decoded=False)

    def settle(self, inputs: Mapping[str, Any], share: float) -> None:
        """Decide by one example whether answers are decoded without being checked, and for good.

        Logits of passes of other lengths round differently. So the example has to be the same one in every
        process, and in a run that continues a killed one: their results then agree to the last bit.

        Args:
            inputs: of the example's prompt; longer prompts are always checked.
            share: the share of edits that changed the example's answer.
        """
        length = own_tokens(inputs).shape[1]
        self.mostly_changed = share > MOST and self.continuing is not None and length <= self._explained
        self._settled = length

    def learn_type(self, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Learn the token type id of answers, in families whose inputs carry token types; once per model."""
        if not self._knows_type and "token_type_ids" in inputs:
            self.greedy(inputs, settings)
        self._knows_type = True

    def record(self, inputs: Mapping[str, Any], tokens: Sequence[int]) -> Passes:
        """Record one pass over a prompt and its answer, in which every answer token is read."""
        return self.replayer.record(
            self.append(inputs, tokens[:-1]), len(tokens), keep=self.not_continued is None
        )

    def append_answer(
        self, inputs: Mapping[str, Any], settings: Mapping[str, Any], tokens: Sequence[int]
    ) -> dict[str, Any]:
        """A prompt with answer tokens that were not generated; the type of answers is learned first."""
        self.learn_type(inputs, settings)
        return self.append(inputs, tokens)

    def append(self, inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        """See `prompts.appended`; answers have the token type of this family."""
        return appended(started(self.anatomy.model, inputs), tokens, self.answer_type)


class _Plan(NamedTuple):
    """The prompt, logits processors and stopping criteria that `generate` prepared for one example."""

    prompt: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig

    @property
    def end_tokens(self) -> list[int]:
        return _listed(self.config.eos_token_id)

    @property
    def ends_by_token(self) -> bool:
        """Whether answers end only at an end token or at full length."""
        return all(isinstance(rule, EosTokenCriteria | MaxLengthCriteria) for rule in self.criteria)

    def choices(self, seen: Tensor, logits: Tensor) -> Tensor:
        """See `hones_eval.engine.continuation.Rules`; uses the model's own logits processors."""
        scores = self.processors(cast(LongTensor, seen), cast(FloatTensor, logits.float()))
        return scores.argmax(-1)

    def ended(self, seen: Tensor) -> Tensor:
        """See `hones_eval.engine.continuation.Rules`."""
        ended: Tensor = self.criteria(cast(LongTensor, seen), cast(FloatTensor, None))
        return ended


class GreedyExample:
    """One decoded example, which can give its answers under edits."""

    def __init__(
        self,
        decoder: Decoder,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        plan: _Plan,
        tokens: list[int],
        logits: Tensor | None = None,
        passes: Replay | None = None,
        decoded: bool = True,
    ) -> None:
        """Made by `Decoder.greedy`.

        Args:
            decoder: made it.
            inputs: of the prompt.
            settings: of `generate`.
            plan: the rules of decoding.
            tokens: the unedited answer, or only its first token where it is not `decoded`.
            logits: those that chose `tokens`, to test whether one pass explains them.
            passes: the pass over prompt and answer, where it is known to explain them.
            decoded: whether the unedited answer is known; otherwise `answers` decodes it with the others.
        """
        self.tokens = tokens
        self.passes: Passes | None = passes
        self._decoder, self._inputs, self._settings, self._plan = decoder, inputs, settings, plan
        self._decoded_yet = decoded
        if not tokens:
            raise HonesError("generate returned no new token: set max_new_tokens to at least 1")
        if passes is not None:
            return
        assert logits is not None
        # Text has token type 0 in most families that mark their image tokens. Where prompts are attended to
        # in both directions (PaliGemma), answers have type 1. The logits of `generate` show which one is
        # right.
        for answer_type in (decoder.answer_type, 1 - decoder.answer_type):
            decoder.answer_type = answer_type
            recorded = decoder.record(inputs, tokens)
            if self._explains(recorded.base_logits, logits):
                self.passes = recorded
                return
            if "token_type_ids" not in inputs:
                break

    def _explains(self, replayed: Tensor, generated: Tensor) -> bool:
        """Whether one pass over prompt and answer gives the logits that `generate` saw."""
        worst = (replayed - generated).abs().max() / generated.abs().max()
        if not bool(worst <= ROUNDING[replayed.dtype]):
            return False
        return first_difference(self.choices(replayed[None])[0], self.tokens) is None

    def forget(self) -> None:
        """Free the memory of the pass that checks the answer; `recall` records it again."""
        self.passes = None

    @torch.no_grad()
    def recall(self) -> None:
        """Record the pass that checks the answer again, after `forget`."""
        self.passes = self._decoder.record(self._inputs, self.tokens)

    @torch.no_grad()
    def along(self, target: Sequence[int]) -> AlongTarget | None:
        """The logits from which `target` is read, by the pass that checks the answer; None without one."""
        if self.passes is None:
            return None
        return self._decoder.branching.along(
            self.passes,
            self.tokens,
            target,
            self._can_continue(self.passes),
            lambda: self._decoder.append(self._inputs, target[:-1]),
        )

    def answers(
        self,
        edits: Sequence[SiteEdit],
        along: AlongTarget | None = None,
        on_rows: Callable[[Rows], None] | None = None,
        on_neurons: NeuronReader | None = None,
    ) -> Iterator[tuple[SiteEdit, list[int]]]:
        """Yield the answer's tokens under every edit; unchanged answers come before those that are decoded.

        Args:
            edits: one at a time.
            along: what `along` returned for a target.
            on_rows: receives the logits [rows, target, vocabulary] along the target.
            on_neurons: see `Passes.edited`; receives nothing where `passes` is None.
        """
        if self.passes is None:
            yield from self._decoded(edits)
            return
        kept = KeptKeys(self.passes) if self._can_continue(self.passes) else None
        yield from self._verified(edits, along, on_rows, on_neurons, kept)

    def _verified(
        self,
        edits: Sequence[SiteEdit],
        along: AlongTarget | None,
        on_rows: Callable[[Rows], None] | None,
        on_neurons: NeuronReader | None,
        kept: KeptKeys | None,
    ) -> Iterator[tuple[SiteEdit, list[int]]]:
        """The answers by replayed passes, whose keys and values `kept` holds."""
        assert self.passes is not None
        differing: list[SiteEdit] = []
        waiting: list[Differing] = []
        numbers = {edit: number for number, edit in enumerate(edits)}
        if kept is None:
            verified = self.passes.edited(edits, on_neurons)
        else:
            verified = kept.replay.edited(edits, on_neurons, kept)
            if not self._decoded_yet:
                assert kept.replay.keys_values is not None
                waiting.append(Differing(None, 0, self.tokens[0], kept.replay.keys_values))
        for rows in verified:
            if along is not None and on_rows is not None:
                on_rows(along.of(rows, kept))
            made = self.choices(rows.logits)
            found = [first_difference(choices, self.tokens) if self._decoded_yet else 0 for choices in made]
            # Rows that are most of their chunk hold its keys and values as they are, at most twice their own.
            few = 2 * sum(place is not None for place in found) < len(found)
            for edit, choices, place in zip(rows.edits, made, found, strict=True):
                if place is None:
                    yield edit, self.tokens
                elif kept is None:
                    differing.append(edit)
                else:
                    before = kept.of(numbers[edit], self._length + place, copy=few)
                    waiting.append(Differing(edit, place, choices[place], before))
                    if len(waiting) >= waiting_rows(before):
                        yield from self._continued(waiting)
                        waiting = []
        yield from self._continued(waiting)
        yield from self._decoded(differing)

    @property
    def _length(self) -> int:
        return own_tokens(self._inputs).shape[1]

    def _can_continue(self, passes: Passes) -> TypeGuard[Replay]:
        """Whether there are keys and values to continue from, where the model expects them."""
        kept = isinstance(passes, Replay) and passes.keys_values is not None
        mask = self._inputs.get("attention_mask")
        return kept and self._decoder.not_continued is None and (mask is None or bool(mask.all()))

    def choices(self, logits: Tensor) -> list[list[int]]:
        """Greedy choices along the unedited answer, from logits [rows, answer, vocabulary]."""
        if not len(self._plan.processors):
            plain: list[list[int]] = logits.argmax(-1).tolist()
            return plain
        answer = torch.tensor([self.tokens], device=logits.device)
        seen = torch.cat([self._plan.prompt.to(logits.device), answer], dim=1).expand(len(logits), -1)
        length = seen.shape[1] - len(self.tokens)
        steps = [self._plan.choices(seen[:, : length + i], logits[:, i]) for i in range(len(self.tokens))]
        return torch.stack(steps, dim=1).tolist()

    def _continued(self, rows: Sequence[Differing]) -> Iterator[tuple[SiteEdit, list[int]]]:
        """Continue answers from their first difference; the first such row proves whether that is exact."""
        decoder, rows = self._decoder, sorted(rows, key=lambda row: row.place)
        for row in rows:
            if decoder.not_continued is not None or decoder.guesses is not None:
                break
            if decoder.continuing is None or self._has_rest(row):
                self._prove(row)
        if decoder.continuing is None:
            yield from self._decoded([row.edit for row in rows if row.edit])
            return
        run = partial(self._continue, decoder.continuing)
        limit = RowLimit(max(1, len(rows)) if self._plan.ends_by_token else 1, self._length)
        for chunk in limit.chunks(rows, self._length, run):
            yield from chunk

    def _continue(
        self, model: PreTrainedModel, rows: Sequence[Differing]
    ) -> list[tuple[SiteEdit, list[int]]]:
        decoder = self._decoder
        drafts = decoder.drafts if decoder.guesses else None
        continued = continue_decoding(model, decoder.anatomy, self._plan, self.tokens, rows, drafts)
        for row, answer in zip(rows, continued.answers, strict=True):
            decoder.drafts.learn(answer)
            if row.edit is None:
                self.tokens, self._decoded_yet = answer, True
        return [(row.edit, answer) for row, answer in zip(rows, continued.answers, strict=True) if row.edit]

    def _has_rest(self, row: Differing) -> bool:
        """Whether the unedited answer goes on after the token that differs, so that a guess can be made."""
        return row.edit is not None and row.place + 1 < len(self.tokens)

    def _prove(self, row: Differing) -> None:
        """Find a model that can continue, by comparing its logits with those of a hooked pass.

        The rest of the unedited answer is passed as a guess first. Otherwise one token is decoded at a time.
        """
        decoder, reasons = self._decoder, []
        for model in candidates(decoder.anatomy) if decoder.continuing is None else [decoder.continuing]:
            for guesses in (True, False) if self._has_rest(row) else (False,):
                reason = self._inexact(model, row, Drafts() if guesses else None)
                if reason is None:
                    decoder.continuing = model
                    decoder.guesses = guesses if self._has_rest(row) else None
                    return
                reasons.append(reason)
        if any(reasons):
            decoder.continuing, decoder.not_continued = None, "; ".join(dict.fromkeys(reasons))

    def _inexact(self, model: PreTrainedModel, row: Differing, drafts: Drafts | None) -> str | None:
        """Why a model does not continue a row exactly, or None; empty where the row shows nothing."""
        decoder = self._decoder
        try:
            continued = continue_decoding(model, decoder.anatomy, self._plan, self.tokens, [row], drafts)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"it cannot be called with the next tokens alone ({first_line(error)})"
        answer = continued.answers[0]
        if len(answer) == continued.start + 1:  # the differing token ends the answer: nothing to compare
            return ""
        inputs = decoder.append(self._inputs, answer[:-1])
        assert row.edit is not None
        full = next(iter(FullPasses(decoder.anatomy, inputs, len(answer)).edited([row.edit])))
        return disagreement(continued, full.logits[0])

    def _decoded(self, edits: Sequence[SiteEdit]) -> Iterator[tuple[SiteEdit, list[int]]]:
        """Decode under each edit from the start; as one batch where only end tokens stop an answer."""
        length = self._plan.prompt.shape[1]
        limit = self._decoder.replayer.limit if self._plan.ends_by_token else RowLimit(1, length)
        for chunk, answers in limit.chunks(edits, length, lambda chunk: (chunk, self._decode_rows(chunk))):
            yield from zip(chunk, answers, strict=True)

    @torch.no_grad()
    def _decode_rows(self, edits: Sequence[SiteEdit]) -> list[list[int]]:
        anatomy = self._decoder.anatomy
        with editing_in(self._decoder.replayer.tracker, list(site_edits(anatomy, edits))):
            output = _generate(anatomy, **repeat_example(self._inputs, len(edits)), **self._settings)
        rows = output[:, self._plan.prompt.shape[1] :].tolist()
        return [cut_at_end(row, self._plan.end_tokens) for row in rows]


def first_difference(choices: Sequence[int], answer: Sequence[int]) -> int | None:
    """The first position at which greedy choices differ from an answer of the same length, or None."""
    pairs = zip(choices, answer, strict=True)
    return next((i for i, (choice, token) in enumerate(pairs) if choice != token), None)


def repeat_example(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeat one example's inputs along the first dimension.

    This is right for tensors [1, ...] and for images packed as [patches, ...] alike.
    """
    repeated: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            repeated[name] = torch.cat([value] * times)
        else:
            repeated[name] = value * times if isinstance(value, list) else value
    return repeated


def end_tokens(model: PreTrainedModel, settings: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, by the settings of a call of `generate` or else by the model's own."""
    return _listed(settings.get("eos_token_id", getattr(model.generation_config, "eos_token_id", None)))


def _listed(ends: int | Sequence[int] | None) -> list[int]:
    """End tokens, which a configuration gives as one number, as several, or not at all."""
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def cut_at_end(tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end token; in a batch, padding follows it."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def near_tie(logits: Tensor) -> bool:
    """Whether rounding could change a greedy choice from logits [..., vocabulary]."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    return bool(((best - second) <= 2 * ROUNDING[logits.dtype] * logits.abs().max()).any())


def _decoded_by_plan(
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    guessed: Callable[[_Plan], GreedyExample | None],
) -> tuple[_Plan, Any]:
    """Decode greedily by `generate`, and return the rules that it prepared and its output with logits.

    `guessed` is called with the rules first; what it returns, if anything, replaces the output.

    The rules are only known inside of `generate`. It hands them to a decoding loop of the caller's, which
    keeps them and calls the loop that `generate` would have called itself. A call of its own for the rules
    would run the vision tower once more.
    """
    seen: list[_Plan] = []

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> Any:
        seen.append(_Plan(input_ids, logits_processor, stopping_criteria, generation_config))
        _check_greedy(generation_config)
        if (example := guessed(seen[-1])) is not None:
            return example
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **rest,
        )

    try:
        output = _generate(
            anatomy,
            **inputs,
            **_without_tokenizer(settings),
            return_dict_in_generate=True,
            output_logits=True,
            custom_generate=decode,
        )
    except (TypeError, ValueError) as error:
        if seen:  # the settings were accepted: the error is the model's own
            raise
        raise HonesError(
            f"generate rejects this task's settings: {' '.join(str(error).split())}; "
            "change them with --gen_kwargs"
        ) from error
    return seen[0], output


def _check_greedy(config: GenerationConfig) -> None:
    if config.do_sample or (config.num_beams or 1) > 1:
        raise HonesError(
            "heads are ranked by greedy decoding, but this task samples or uses beam search: "
            "pass --gen_kwargs do_sample=False,temperature=0,num_beams=1"
        )


def _without_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with stop strings as a stopping criterion, which needs no tokenizer in `generate`."""
    rest = dict(settings)
    tokenizer, strings = rest.pop("tokenizer", None), rest.get("stop_strings")
    if tokenizer is not None and strings:
        rules = list(rest.get("stopping_criteria") or [])
        rest["stopping_criteria"] = StoppingCriteriaList([*rules, StopStringCriteria(tokenizer, strings)])
        del rest["stop_strings"]
    return rest


def _generate(anatomy: Anatomy, **arguments: Any) -> Any:
    # Call the class's own method: one of our wrappers may have replaced `generate` on the instance.
    kind: Any = type(anatomy.model)
    return kind.generate(anatomy.model, **arguments)
