"""One model's answers with nothing changed and under several steerings, on the same examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.hooks import Edit, Site, editing
from hones_eval.core.steering import Steering
from hones_eval.engine.decoding import Decoder, cut_at_end, repeat_example
from hones_eval.engine.passes import refuse_not_finite
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.answers import choices, margin
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.measure import Measurement, Totals

BASELINE = "baseline"


class Answer(NamedTuple):
    """One answer: its result by the task, and what the first step said of the gold answer.

    `probability` is that of the target's first token; `correct` whether the likeliest token is one of the
    target's (V-SEAM 3).
    """

    result: dict[str, Any]
    probability: float
    correct: bool


class _Said(NamedTuple):
    """One row's answer as text, or its target's log-probability, and the logits that it begins with."""

    answer: str | float
    first: Tensor


class Answered(NamedTuple):
    """One example's pictures, and its answers by the name of the steering."""

    pictures: tuple[str, ...]
    answers: dict[str, Answer]


class AnswersUnder:
    """One pass: the model's own `generate` answers every example, plainly and under every steering.

    Steerings are the rows of a batch, as many as the replayer runs at once: row `i` has its heads and neurons
    multiplied by the scales of steering `i`.
    """

    def __init__(self, replayer: Replayer, examples: TaskExamples, steerings: Mapping[str, Steering]) -> None:
        """Answer with nothing changed, called `baseline`, and under each of `steerings`.

        Raises: MisfitError when a steering was made for a model of another shape.
        """
        self.anatomy, self.limit = replayer.anatomy, replayer.limit
        self.decoder = Decoder(replayer)
        if BASELINE in steerings:
            raise HonesError(f"a steering cannot be called {BASELINE!r}: that is the model without one")
        for steering in steerings.values():
            steering.check_fits(self.anatomy.shape, type(self.anatomy.model).__name__)
        self.examples = examples
        self.steerings = dict(steerings)
        self._edits: dict[tuple[str, ...], list[tuple[Site, Edit]]] = {}

    def zeros(self) -> dict[str, Tensor]:
        """The count of examples."""
        return {"examples": torch.zeros((), dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        """Answer and score one example; its record is an `Answered`."""
        say = self._way_of_saying(example)
        said = dict(zip([BASELINE], say(example, [], 1), strict=True))
        names, length = list(self.steerings), int(example.inputs["input_ids"].shape[1])
        if self._ends_by_token(example):
            for cut, answers in self.limit.chunks(
                names, length, lambda cut: (cut, say(example, cut, len(cut)))
            ):
                said |= zip(cut, answers, strict=True)
        else:
            said |= {name: say(example, [name], 1)[0] for name in names}
        results: dict[str, dict[str, Any]] = {}
        scored = {name: self._scored(example, name, said[name], results) for name in said}
        record = Answered(tuple(example.image_hashes), scored)
        return Measurement({"examples": torch.ones((), dtype=torch.float64)}, record)

    def _scored(
        self, example: Example, name: str, said: "_Said", results: dict[str, dict[str, Any]]
    ) -> Answer:
        if not bool(torch.isfinite(said.first).all()):
            with editing(self._row_edits(tuple(one for one in [name] if one != BASELINE))):
                where = f"{example.task}, doc_id {example.doc_id}, under {name}"
                refuse_not_finite(self.anatomy, example.inputs, where)
        if isinstance(said.answer, float):
            result = {self.examples.metric: said.answer}
        else:
            if said.answer not in results:
                results[said.answer] = self.examples.score(example.index, said.answer)
            result = results[said.answer]
        target = torch.tensor(example.target_ids[:1], device=said.first.device)
        probability = float(readouts.answer_probability(said.first[None], target))
        return Answer(result, probability, int(said.first.argmax()) in example.target_ids)

    def _way_of_saying(self, example: Example) -> Callable[[Example, Sequence[str], int], list["_Said"]]:
        if self.examples.by_log_probability:
            return self._say_target
        return self._generate if example.choices is None else self._choose

    @torch.no_grad()
    def _generate(self, example: Example, names: Sequence[str], rows: int) -> list["_Said"]:
        """What the wrapper makes of the new tokens, or the margin at the first, of every row."""
        model: Any = self.anatomy.model  # every served model mixes in GenerationMixin
        with editing(self._row_edits(tuple(names))):
            output = model.generate(
                **repeat_example(example.inputs, rows),
                **(example.settings | ({} if example.margin is None else {"max_new_tokens": 1})),
                return_dict_in_generate=True,
                output_logits=True,
            )
        first = output.logits[0]
        if example.margin is not None:
            margins = [margin.as_text(value) for value in example.margin.of(first).tolist()]
            return [_Said(*one) for one in zip(margins, first, strict=True)]
        # Counted from the end: some families repeat the prompt in front, some do not.
        new = output.sequences[:, -len(output.logits) :].tolist()
        ends = self._end_tokens(example)
        texts = [self.examples.decode(example.index, cut_at_end(tokens, ends)) for tokens in new]
        return [_Said(*one) for one in zip(texts, first, strict=True)]

    def _choose(self, example: Example, names: Sequence[str], rows: int) -> list["_Said"]:
        """What the wrapper makes of every choice, and the logits where the right one begins, of every row."""
        assert example.choices is not None
        offered, gold, start, reading = example.choices
        read, first = [], torch.empty(0)
        for place, choice in enumerate(offered):
            logits = self._logits(choice.inputs, names, rows, choice.scored + 1)
            read.append(choice.read(logits, reading))
            if place == gold:
                first = logits[:, start]
        values, greedy = (torch.stack(parts, dim=1).tolist() for parts in zip(*read, strict=True))
        said = [choices.as_text(*one) for one in zip(values, greedy, strict=True)]
        return [_Said(*one) for one in zip(said, first, strict=True)]

    def _say_target(self, example: Example, names: Sequence[str], rows: int) -> list["_Said"]:
        """The target's log-probability behind the prompt, and the logits where it begins, of every row."""
        self.decoder.learn_type(example.inputs, example.settings)
        inputs = self.decoder.append(example.inputs, example.target_ids[:-1])
        logits = self._logits(inputs, names, rows, len(example.target_ids))
        ids = torch.tensor(example.target_ids, device=logits.device)
        values = readouts.sequence_log_probability(logits, ids).tolist()
        return [_Said(*one) for one in zip(values, logits[:, 0], strict=True)]

    @torch.no_grad()
    def _logits(self, inputs: Mapping[str, Any], names: Sequence[str], rows: int, read: int) -> Tensor:
        """Logits [rows, read, vocabulary] at the last positions, each row under its own steering."""
        with editing(self._row_edits(tuple(names))):
            logits: Tensor = self.anatomy.model(**repeat_example(inputs, rows), use_cache=False).logits
        return logits[:, -read:]

    def _row_edits(self, names: tuple[str, ...]) -> list[tuple[Site, Edit]]:
        """An edit for every linear layer whose input some of the steerings scale."""
        if names not in self._edits:
            chosen = [self.steerings[name] for name in names]
            edits: list[tuple[Site, Edit]] = []
            for layer in range(self.anatomy.shape.layers) if chosen else ():
                heads = torch.stack([one.head_scales[layer] for one in chosen])
                heads = heads.repeat_interleave(self.anatomy.shape.head_width, dim=1)
                neurons = torch.stack([one.neuron_scales[layer] for one in chosen])
                sites = (self.anatomy.heads_in[layer], heads), (self.anatomy.neurons_in[layer], neurons)
                edits += [(site, _scaling(rows)) for site, rows in sites if not bool((rows == 1).all())]
            self._edits[names] = edits
        return self._edits[names]

    def _end_tokens(self, example: Example) -> list[int]:
        ends = example.settings.get("eos_token_id", self._config("eos_token_id"))
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _ends_by_token(self, example: Example) -> bool:
        """Whether rows end by themselves; stop strings and other rules look at the whole batch."""
        rules = ("stopping_criteria", "stop_strings")
        return not any(example.settings.get(rule) or self._config(rule) for rule in rules)

    def _config(self, name: str) -> Any:
        return getattr(self.anatomy.model.generation_config, name, None)


def _scaling(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Scale row `i` of a batch [rows, tokens, features] by `rows[i]`."""

    def scale(x: Tensor) -> Tensor:
        return (x * rows[:, None].to(x.device)).to(x.dtype)  # in float32, as `edits.scale`

    return scale


def answered(totals: Totals) -> list[Answered]:
    """The records of a pass, in the order of the examples; also of one that went on after a kill."""
    records = [totals.records[index] for index in sorted(totals.records)]
    return [
        Answered(tuple(pictures), {name: Answer(*one) for name, one in answers.items()})
        for pictures, answers in records
    ]
