"""The protocol of a kind of answer.

A kind of answer is what a model is asked for: generated text, the margin between two words, the likeliest of
several choices, the log-probability of the gold answer. Everything that depends on the kind is a method of
one object, in one module per kind:

    recording     which tasks ask for the kind, and what is recorded of a question (`recorder`)
    scoring       what lmms-eval's filters and `process_results` are given (`responses`)
    edits         how the answer changes under each head and neuron edit (`under_edits`)
    steerings     the answers of a batch whose rows have steerings of their own (`under_steerings`)
    the wrapper   what a steered lmms-eval model reads from the logits of one call (`reader`)

Answers are texts everywhere, whatever their kind, so that records, caches and logs hold one type. A new kind
is a module with a subclass of `AnswerKind`, and its entry in `hones_eval.lmms.answers.registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hones_eval.engine.decoding import Decoder
from hones_eval.engine.passes import NeuronReader, Passes, SiteEdit
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.example import Example
from hones_eval.lmms.targets import NONSENSE


class Recording(NamedTuple):
    """What is recorded of one question; see the fields of the same names in `Example`."""

    inputs: dict[str, Any]
    settings: dict[str, Any]
    target_ids: list[int]
    details: Any = None
    is_distractor: bool = False


class Calls(Protocol):
    """The calls that a wrapper makes for a request, without a forward pass where that is possible."""

    model: PreTrainedModel

    def record(self, instance: Instance) -> Any:
        """The arguments of `generate`: inputs and settings."""

    def record_forward(self, instance: Instance) -> dict[str, Any]:
        """The arguments of `forward` for a log-likelihood request."""

    def log_likelihood(self, instance: Instance) -> float:
        """The value that the wrapper itself returns for a log-likelihood request, by a forward pass."""

    def finds_greedy(self, instance: Instance, late: int) -> bool:
        """Whether the wrapper calls a choice greedy when the model is certain of each token."""

    @property
    def wrapper_name(self) -> str:
        """The wrapper's class, as messages name it."""


class RecordedTask(NamedTuple):
    """A built task, and the means to record its requests."""

    task: Task
    requests: Sequence[Sequence[Instance]]
    """Per document: one request, or one per choice."""
    calls: Calls
    tokenizer: PreTrainedTokenizerBase
    document: Callable[[int], dict[str, Any]]
    """A copy of the document with a doc_id, without its images."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The generation settings of the task."""
        return settings_of(self.requests[0][0])


class Recorder(ABC):
    """Records the questions of one task, and turns gold answers into answers that can be scored."""

    proof_examples = 8
    """How many examples prove a metric and a gold answer."""
    shares_prompts = False
    """Whether prompts with a common prefix are measured together."""
    has_distractors = False
    """Whether some examples are candidates that are not the right answer of their query."""

    @abstractmethod
    def record(self, index: int, gold: str) -> Recording:
        """Record one example without a forward pass."""

    def as_answer(self, doc: Mapping[str, Any], text: str) -> str:
        """A gold answer in words, in the form of an answer of this kind."""
        return text

    def wrong_answer(self, doc: Mapping[str, Any]) -> str:
        """An answer that is not correct, against which gold answers are proven."""
        return NONSENSE

    def report(self) -> dict[str, Any]:
        """What a ranking's report says about this kind of answer."""
        return {}


class RowAnswer(NamedTuple):
    """One row's answer as text, and the logits [vocabulary] from which it begins."""

    text: str
    first: Tensor


class OwnMetric(NamedTuple):
    """The metric of a kind that brings its own: the unedited value, and its drop under each edit [E]."""

    base: float
    drops: Tensor


class EditedAnswers(NamedTuple):
    """One example's answers, unedited and under edits. E counts all edits of the run, in its order."""

    base: str
    changed: Mapping[int, str]
    """Answers under the edits that change them, by the edit's number."""
    log_probability: float
    """Of the gold answer, unedited."""
    drops: Tensor
    """Of the gold answer's log-probability [E], 0 under edits that were not measured."""
    differing: int
    """How many edits change the answer."""
    shared: bool = False
    """Whether a prefix was shared with other prompts."""
    decoded_in_full: bool = False
    """Whether the answers had to be decoded from the start."""
    metric: OwnMetric | None = None
    """For a kind that brings its own metric; otherwise answers are scored by the task's."""
    margin_drops: Tensor | None = None
    """Of the gold answer's margin [E], for text answers of a run with `margins`; None elsewhere."""


class Examples(Protocol):
    """The part of `TaskExamples` that kinds of answers use."""

    def __getitem__(self, index: int) -> Example:
        """The example with an index."""

    def decode(self, index: int, token_ids: list[int]) -> str:
        """The answer that the wrapper makes of generated tokens."""

    def with_same_images(self, index: int) -> list[Example]:
        """The neighboring examples that show the same images, the example itself among them."""


class NeuronSink(Protocol):
    """Takes FFN activations at the last prompt token, from passes that are run for another reason."""

    def start(self, example: Example, base: Sequence[Tensor], numbers: Sequence[int]) -> NeuronReader:
        """A reader for the passes of an example under the edits with these numbers.

        `base` are the unedited activations [I] by layer.
        """


class EditRun(NamedTuple):
    """The model, the examples and the edits of one pass, as kinds of answers use them."""

    replayer: Replayer
    examples: Examples
    edits: Sequence[SiteEdit]
    numbers: Mapping[SiteEdit, int]
    """Each edit's number in `edits`."""
    decoder: Decoder
    sharing: SharedReplayer
    ahead: dict[Any, Any]
    """Results that a kind computed for later examples together with an earlier one; empty at the start."""
    margins: bool = False
    """Whether the margin of gold answers in words is read too."""
    log_probability: bool = True
    """Whether the gold answer's log-probability is wanted where it takes work of its own."""
    neurons: "NeuronSink | None" = None
    """Takes the FFN activations of the passes that answer an example, if its kind `passes_neurons` on."""
    share: bool = False
    """Whether generated answers to questions about one image are checked together."""

    @classmethod
    def of(
        cls,
        replayer: Replayer,
        examples: Examples,
        edits: Sequence[SiteEdit],
        margins: bool = False,
        log_probability: bool = True,
    ) -> "EditRun":
        """Measure `edits` on `examples` with the replayer's model."""
        numbers = {edit: number for number, edit in enumerate(edits)}
        decoder, sharing = Decoder(replayer), SharedReplayer(replayer)
        return cls(replayer, examples, edits, numbers, decoder, sharing, {}, margins, log_probability)

    def reader_of(
        self, example: Example, passes: Passes | None, numbers: Sequence[int]
    ) -> NeuronReader | None:
        """A reader of FFN activations for passes whose first position read is the last of the prompt."""
        if self.neurons is None or passes is None:
            return None
        return self.neurons.start(example, [z[0] for z in passes.base_neurons()], numbers)


class SteeringRun(Protocol):
    """Forward passes of a batch whose rows are steered differently."""

    decoder: Decoder

    def generate(self, example: Example, names: Sequence[str], **settings: Any) -> Any:
        """The output of `generate` with logits; one row per named steering, one unsteered row for none."""

    def logits(self, inputs: Mapping[str, Any], names: Sequence[str], read: int) -> Tensor:
        """Logits [rows, read, vocabulary] at the last positions."""

    def answers(self, example: Example, output: Any) -> list[str]:
        """The texts that the wrapper makes of the rows of a `generate`."""


class NextTokenReader(Protocol):
    """Reads one answer from the logits after a prompt, inside a steered wrapper."""

    text: str | None
    """The answer; None until `read` was called."""

    def read(self, prompt: Tensor, logits: Tensor) -> None:
        """Read the answer from logits [1, vocabulary] after a prompt [1, tokens]."""


class AnswerKind(ABC):
    """One kind of answer. It holds no state: what belongs to a task or a run is passed in."""

    name: str
    settings: frozenset[str] = frozenset()
    """Generation settings of tasks that belong to this kind; wrappers and `generate` do not see them."""
    metric: str | None = None
    """The metric that this kind brings with it; None where the task's metrics score the answers."""
    many_answers = False
    """Whether almost every edit gives an answer of its own, so that results are not worth remembering."""
    passes_neurons = False
    """Whether the passes of `under_edits` pass FFN activations on to the run's `neurons`."""
    replaces_decoding: str | None = None
    """What a ranking's report says instead of how answers were decoded; None where they are decoded."""

    def recorder(self, task: RecordedTask) -> Recorder | None:
        """The recorder of a task that asks for this kind; None for other tasks."""
        return None

    def responses(self, text: str) -> list[Any]:
        """An answer as lmms-eval's filters and `process_results` take it."""
        return [text]

    def own_result(self, text: str) -> dict[str, Any] | None:
        """The result of an answer by `metric`; None where the task scores it."""
        return None

    @abstractmethod
    def under_edits(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """Answer one example, unedited and under the edits with these numbers."""

    @abstractmethod
    def under_steerings(self, run: SteeringRun, example: Example, names: Sequence[str]) -> list[RowAnswer]:
        """Answer one example in one row per named steering; in one unsteered row where none is named."""

    def record(self, answers: EditedAnswers) -> dict[str, Any]:
        """The answers as plain JSON, for metrics that only a whole corpus has."""
        return {
            "base": answers.base,
            "changed": {str(number): text for number, text in answers.changed.items()},
        }

    def changed(self, record: Mapping[str, Any]) -> Mapping[int, str]:
        """The answers that changed, by the edit's number, from a `record`."""
        return {int(number): text for number, text in record["changed"].items()}

    def reader(
        self, settings: Mapping[str, Any], task: str, tokenizer: PreTrainedTokenizerBase
    ) -> NextTokenReader | None:
        """The reader of a request that asks for this kind; None where the wrapper answers in words."""
        return None


def settings_of(request: Instance) -> dict[str, Any]:
    """The generation settings of a request; empty where it has none."""
    return next((part for part in request.args if isinstance(part, dict)), {})
