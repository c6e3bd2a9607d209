"""Text answers: what the wrapper makes of the tokens that the model generates."""

from collections.abc import Sequence

from hones_eval.lmms.answers.kind import (
    AnswerKind,
    EditedAnswers,
    EditRun,
    RecordedTask,
    Recorder,
    Recording,
    RowAnswer,
    SteeringRun,
)
from hones_eval.lmms.answers.target import Target
from hones_eval.lmms.answers.together import Together
from hones_eval.lmms.example import Example


class TextRecorder(Recorder):
    """Records prompts; the target is the gold answer encoded alone."""

    def __init__(self, task: RecordedTask) -> None:
        """Record `task`."""
        self.task = task

    def record(self, index: int, gold: str) -> Recording:
        """The arguments of `generate`, as the wrapper passes them."""
        inputs, settings = self.task.calls.record(self.task.requests[index][0])
        return Recording(inputs, settings, self.task.tokenizer.encode(gold, add_special_tokens=False))


class TextAnswers(AnswerKind):
    """Generated text, greedily decoded."""

    name = "text"
    passes_neurons = True

    def recorder(self, task: RecordedTask) -> Recorder | None:
        """A recorder for every task that generates; other kinds are asked first."""
        return TextRecorder(task)

    def under_edits(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """The answers to one example, or those that its group has given ahead; see `answers.together`."""
        if not run.share:
            return self._alone(run, example, numbers)
        together: Together = run.ahead.setdefault(self.name, Together(self._alone))
        return together.of(run, example, numbers)

    def _alone(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """The answers to one example; the task's first example shows whether most edits change them.

        A process that does not begin with that example measures it for this alone. Searches that measure a
        part of the edits do without it.
        """
        if not _is_whole(run, numbers) or run.decoder.mostly_changed is not None:
            return self._measured(run, example, numbers)
        first = example if example.index == 0 else run.examples[0]
        answers = self._measured(run if first is example else run._replace(neurons=None), first, numbers)
        run.decoder.settle(first.inputs, answers.differing / max(1, len(numbers)))
        return answers if first is example else self._measured(run, example, numbers)

    def _measured(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """Decode once, check the answer under every edit, and decode only the answers that differ.

        The same passes also give the target's log-probability, where the model can branch off its answer
        (see `hones_eval.engine.branches`). Otherwise the target is replayed from the start.
        """
        decoded = run.decoder.greedy(
            example.inputs, example.settings, example.target_ids, unchecked=_is_whole(run, numbers)
        )
        target = Target(run, example)
        along = decoded.along(example.target_ids) if run.log_probability else None
        if along is not None:
            target.start(along.passes, along.base_logits)
        edits = [run.edits[number] for number in numbers]
        differing: dict[int, str] = {}
        reader = run.reader_of(example, decoded.passes, numbers)
        for edit, tokens in decoded.answers(edits, along, target.add, reader):
            if tokens != decoded.tokens:
                differing[run.numbers[edit]] = run.examples.decode(example.index, tokens)
        if along is None and run.log_probability:
            target.replay(edits)
        return EditedAnswers(
            base=run.examples.decode(example.index, decoded.tokens),
            changed=differing,
            log_probability=target.base,
            drops=target.drops,
            differing=len(differing),
            decoded_in_full=decoded.passes is None,
            margin_drops=target.margin_drops,
        )

    def under_steerings(self, run: SteeringRun, example: Example, names: Sequence[str]) -> list[RowAnswer]:
        """What the wrapper makes of the new tokens of every row."""
        output = run.generate(example, names)
        return [
            RowAnswer(text, logits)
            for text, logits in zip(run.answers(example, output), output.logits[0], strict=True)
        ]


def _is_whole(run: EditRun, numbers: Sequence[int]) -> bool:
    """Whether all edits of a run are measured, and depend on nothing but the example."""
    return len(numbers) == len(run.edits) and all(edit.other is None for edit in run.edits)
