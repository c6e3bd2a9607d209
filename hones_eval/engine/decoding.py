"""Greedy answers of one example, unedited and with one head or neuron at a time edited.

Decoding under an edit gives the unedited answer exactly when, with that answer appended to the prompt, every
greedy choice along it agrees. One replayed pass tells; only the edits that differ are decoded.
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
from hones_eval.core.hooks import editing
from hones_eval.engine.continuation import Differing, KeptKeys, disagreement, go_on, speakers, waiting_rows
from hones_eval.engine.passes import ROUNDING, FullPasses, Passes, RowLimit, Rows, SiteEdit, site_edits
from hones_eval.engine.prompts import appended
from hones_eval.engine.replay import Replay, Replayer
from hones_eval.errors import HonesError, first_line


class Decoder:
    """Greedy decoding of examples with the model's own `generate`, and under edits of single sites."""

    def __init__(self, replayer: Replayer) -> None:
        """Decode with the model that `replayer` replays."""
        self.replayer = replayer
        self.anatomy = replayer.anatomy
        self.answer_type = 0
        self._knows_type = False
        self.speaker: PreTrainedModel | None = None
        """What answers that differ are decoded on with, once that is proven; see `continuation`."""
        self.stops: str | None = None
        """Why they are decoded from the start, where they are."""

    @torch.no_grad()
    def greedy(self, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> "GreedyExample":
        """Decode one example (a batch of one) unedited; see `GreedyExample` for the edited answers."""
        plan = _plan(self.anatomy, inputs, settings)
        output = _generate(
            self.anatomy, **inputs, **settings, return_dict_in_generate=True, output_logits=True
        )
        tokens: list[int] = output.sequences[0, plan.prompt.shape[1] :].tolist()
        logits = torch.cat(output.logits)
        return GreedyExample(self, inputs, settings, plan, tokens, logits)

    def learn_type(self, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Find out what type id an answer's tokens have, in the families that have types; once."""
        if not self._knows_type and "token_type_ids" in inputs:
            self.greedy(inputs, settings)
        self._knows_type = True

    def record(self, inputs: Mapping[str, Any], tokens: Sequence[int]) -> Passes:
        """One pass over a prompt and its answer, of which every token is read."""
        return self.replayer.record(self.append(inputs, tokens[:-1]), len(tokens), keep=self.stops is None)

    def append(self, inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        """See `prompts.appended`, with the type that an answer has in this family."""
        return appended(inputs, tokens, self.answer_type)


class _Plan(NamedTuple):
    """What `generate` would decode with, after its own preparation of settings."""

    prompt: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig

    @property
    def end_tokens(self) -> list[int]:
        ends = self.config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @property
    def ends_by_token(self) -> bool:
        """Whether an answer ends at an end token or at full length, and by no other rule."""
        return all(isinstance(rule, EosTokenCriteria | MaxLengthCriteria) for rule in self.criteria)

    def choices(self, seen: Tensor, logits: Tensor) -> Tensor:
        """See `hones_eval.engine.continuation.Rules`: by the model's own logits processors."""
        scores = self.processors(cast(LongTensor, seen), cast(FloatTensor, logits.float()))
        return scores.argmax(-1)

    def ended(self, seen: Tensor) -> Tensor:
        """See `hones_eval.engine.continuation.Rules`."""
        ended: Tensor = self.criteria(cast(LongTensor, seen), cast(FloatTensor, None))
        return ended


class GreedyExample:
    """One decoded example, from which the answers under edits are worked out."""

    def __init__(
        self,
        decoder: Decoder,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        plan: _Plan,
        tokens: list[int],
        logits: Tensor,
    ) -> None:
        """Made by `Decoder.greedy`; `tokens` is the unedited answer."""
        self.tokens = tokens
        self.passes: Passes | None = None
        self._decoder, self._inputs, self._settings, self._plan = decoder, inputs, settings, plan
        if not tokens:
            raise HonesError("generate gave no new token at all: is max_new_tokens 0?")
        # Text is of type 0 in most families that mark their picture tokens; where the prompt is attended to
        # in both directions (PaliGemma), an answer is of type 1. The logits of `generate` tell which it is.
        for answer_type in (decoder.answer_type, 1 - decoder.answer_type):
            decoder.answer_type = answer_type
            passes = decoder.record(inputs, tokens)
            if self._explains(passes.base_logits, logits):
                self.passes = passes
                return
            if "token_type_ids" not in inputs:
                break

    def _explains(self, replayed: Tensor, generated: Tensor) -> bool:
        """Whether one pass over prompt and answer gives what `generate` saw, so that it can verify."""
        worst = (replayed - generated).abs().max() / generated.abs().max()
        if not bool(worst <= ROUNDING[replayed.dtype]):
            return False
        return first_difference(self._choices(replayed[None])[0], self.tokens) is None

    def covers(self, target: Sequence[int]) -> bool:
        """Whether the pass that verifies the answer also reads every token of `target`."""
        return self.passes is not None and self.tokens[: len(target)] == list(target)

    def answers(
        self, edits: Sequence[SiteEdit], on_rows: Callable[[Rows], None] | None = None
    ) -> Iterator[tuple[SiteEdit, list[int]]]:
        """The answer's tokens under every edit, unchanged answers before those that have to be decoded.

        `on_rows` sees the logits [rows, answer, vocabulary] along the unedited answer, as they are replayed.
        """
        if self.passes is None:
            yield from self._decoded(edits)
            return
        differing: list[SiteEdit] = []
        waiting: list[Differing] = []
        kept = KeptKeys(self.passes) if self._goes_on(self.passes) else None
        numbers = {edit: number for number, edit in enumerate(edits)}
        verified = self.passes.edited(edits) if kept is None else kept.replay.edited(edits, on_keys=kept)
        for rows in verified:
            if on_rows is not None:
                on_rows(rows)
            for edit, choices in zip(rows.edits, self._choices(rows.logits), strict=True):
                place = first_difference(choices, self.tokens)
                if place is None:
                    yield edit, self.tokens
                elif kept is None:
                    differing.append(edit)
                else:
                    before = kept.of(numbers[edit], self._length + place)
                    waiting.append(Differing(edit, place, choices[place], before))
                    if len(waiting) == waiting_rows(before):
                        yield from self._continued(waiting)
                        waiting = []
        yield from self._continued(waiting)
        yield from self._decoded(differing)

    @property
    def _length(self) -> int:
        length: int = self._inputs["input_ids"].shape[1]
        return length

    def _goes_on(self, passes: Passes) -> TypeGuard[Replay]:
        """Whether there are keys and values to decode on from, where the model looks for them."""
        kept = isinstance(passes, Replay) and passes.keys_values is not None
        mask = self._inputs.get("attention_mask")
        return kept and self._decoder.stops is None and (mask is None or bool(mask.all()))

    def _choices(self, logits: Tensor) -> list[list[int]]:
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
        """Decode on from the first difference; the first row that ever is shows whether this is exact."""
        decoder, rows = self._decoder, sorted(rows, key=lambda row: row.place)
        for row in rows:
            if decoder.speaker is not None or decoder.stops is not None:
                break
            self._prove(row)
        if decoder.speaker is None:
            yield from self._decoded([row.edit for row in rows])
            return
        run = partial(self._go_on, decoder.speaker)
        limit = RowLimit(max(1, len(rows)) if self._plan.ends_by_token else 1, self._length)
        for cut in limit.cuts(rows, self._length, run):
            yield from cut

    def _go_on(self, speaker: PreTrainedModel, rows: Sequence[Differing]) -> list[tuple[SiteEdit, list[int]]]:
        continued = go_on(speaker, self._decoder.anatomy, self._plan, self.tokens, rows)
        answers = [cut_at_end(row, self._plan.end_tokens) for row in continued.answers.tolist()]
        return [(row.edit, answer) for row, answer in zip(rows, answers, strict=True)]

    def _prove(self, row: Differing) -> None:
        """Find what can go on, by comparing logits with a hooked pass over prompt and edited answer."""
        decoder, reasons = self._decoder, []
        for speaker in speakers(decoder.anatomy):
            try:
                continued = go_on(speaker, decoder.anatomy, self._plan, self.tokens, [row])
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                reasons.append(f"it cannot take the next token alone ({first_line(error)})")
                continue
            answer = cut_at_end(continued.answers[0].tolist(), self._plan.end_tokens)
            if len(answer) == continued.start + 1:  # ended where it differs: nothing to compare
                return
            inputs = decoder.append(self._inputs, answer[:-1])
            full = next(iter(FullPasses(decoder.anatomy, inputs, len(answer)).edited([row.edit])))
            reason = disagreement(continued, full.logits[0])
            if reason is None:
                decoder.speaker = speaker
                return
            reasons.append(reason)
        decoder.stops = "; ".join(reasons)

    def _decoded(self, edits: Sequence[SiteEdit]) -> Iterator[tuple[SiteEdit, list[int]]]:
        """Decode under each edit from the start, as rows of one batch where rows end by themselves."""
        length = self._plan.prompt.shape[1]
        limit = self._decoder.replayer.limit if self._plan.ends_by_token else RowLimit(1, length)
        for cut, answers in limit.cuts(edits, length, lambda cut: (cut, self._decode_rows(cut))):
            yield from zip(cut, answers, strict=True)

    @torch.no_grad()
    def _decode_rows(self, edits: Sequence[SiteEdit]) -> list[list[int]]:
        anatomy = self._decoder.anatomy
        with editing(list(site_edits(anatomy, edits))):
            output = _generate(anatomy, **repeat_example(self._inputs, len(edits)), **self._settings)
        rows = output[:, self._plan.prompt.shape[1] :].tolist()
        return [cut_at_end(row, self._plan.end_tokens) for row in rows]


def first_difference(choices: Sequence[int], answer: Sequence[int]) -> int | None:
    """Where greedy choices first leave an answer of the same length."""
    return next((i for i, (one, other) in enumerate(zip(choices, answer, strict=True)) if one != other), None)


def repeat_example(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """One example's inputs `times` times over, along the first dimension.

    That is right for tensors [1, ...] and for pictures packed as [patches, ...] alike.
    """
    repeated: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            repeated[name] = torch.cat([value] * times)
        else:
            repeated[name] = value * times if isinstance(value, list) else value
    return repeated


def cut_at_end(tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
    """The tokens up to and with the first end token; what follows in a batch is padding."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def _plan(anatomy: Anatomy, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> _Plan:
    """Let `generate` prepare everything and stop before its decoding loop, to see what it would use."""
    seen: list[_Plan] = []

    def stop(
        model: object,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> Tensor:
        seen.append(_Plan(input_ids, logits_processor, stopping_criteria, generation_config))
        return input_ids

    try:
        _generate(anatomy, **inputs, **_without_tokenizer(settings), custom_generate=stop)
    except (TypeError, ValueError) as error:
        raise HonesError(
            f"generate refuses this task's settings: {' '.join(str(error).split())}; "
            "change them with --gen_kwargs"
        ) from error
    plan = seen[0]
    if plan.config.do_sample or (plan.config.num_beams or 1) > 1:
        raise HonesError(
            "heads are localized by greedy decoding, but this task samples or searches with beams: "
            "pass --gen_kwargs do_sample=False,temperature=0,num_beams=1"
        )
    return plan


def _without_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with stop strings as a rule; `generate` hands a tokenizer to no function of ours."""
    rest = dict(settings)
    tokenizer, strings = rest.pop("tokenizer", None), rest.get("stop_strings")
    if tokenizer is not None and strings:
        rules = list(rest.get("stopping_criteria") or [])
        rest["stopping_criteria"] = StoppingCriteriaList([*rules, StopStringCriteria(tokenizer, strings)])
        del rest["stop_strings"]
    return rest


def _generate(anatomy: Anatomy, **arguments: Any) -> Any:
    # The class's own: on the instance a wrapper of ours may stand in, which watches over answers.
    kind: Any = type(anatomy.model)
    return kind.generate(anatomy.model, **arguments)
