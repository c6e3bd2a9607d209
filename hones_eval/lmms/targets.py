"""Gold answers of tasks in words: chosen by task name or by column, and proven by the task's own scoring.

`doc_to_target` is not always the gold answer: for vqav2, flickr30k and coco it is the literal word `answer`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from numbers import Real
from typing import Any, NamedTuple

from jinja2 import TemplateError
from lmms_eval.api.task import Task
from lmms_eval.utils import apply_template

from hones_eval.errors import TaskError

MOST_REFERENCES = 5
NONSENSE = "~"
"""An answer that no gold answer is."""


class Gold(NamedTuple):
    """The text that stands for a document's answer, and the answers that count as correct, best first."""

    target: str
    references: list[str]


Adapter = Callable[[Mapping[str, Any]], Gold]


class Candidate(NamedTuple):
    """A way to get a document's gold answer; one `named` for the task beats guesses with better scores."""

    name: str
    adapter: Adapter
    named: bool = False


def alternatives(column: str) -> Adapter:
    """Answers of several people, or several spellings; the most common one is the target."""
    return lambda doc: most_common(texts_in(doc.get(column)))


def captions(column: str) -> Adapter:
    """Descriptions of one image; up to five, joined, are the target (HONES, vocabulary projection)."""
    return lambda doc: joined(texts_in(doc.get(column)))


def box(column: str) -> Adapter:
    """A box of four numbers, in the brackets that grounding tasks parse."""
    return lambda doc: _single("[" + ", ".join(f"{float(x):.3f}" for x in doc.get(column) or []) + "]")


BY_NAME: tuple[tuple[str, Adapter], ...] = (
    ("vqav2*", alternatives("answers")),
    ("ok_vqa*", alternatives("answers")),
    ("vizwiz_vqa*", alternatives("answers")),
    ("textvqa*", alternatives("answers")),
    ("docvqa*", alternatives("answers")),
    ("infovqa*", alternatives("answers")),
    ("stvqa*", alternatives("answers")),
    ("chartqa*", alternatives("answer")),
    ("gqa*", alternatives("answer")),
    ("pope*", alternatives("answer")),
    ("coco*_cap*", captions("answer")),
    ("flickr30k*", captions("caption")),
    ("nocaps*", captions("annotations_captions")),
    ("textcaps*", captions("caption_str")),
    ("refcoco*bbox_rec*", box("bbox")),
    ("refcoco*", captions("answer")),
    ("hones_caption*", captions("references")),
    ("hones_flickr30k", captions("references")),
)
COLUMNS = (
    *("answer", "answers", "gold", "target", "gt", "ground_truth", "label", "correct_answer"),
    *("caption", "captions"),
)
CAPTION_METRICS = ("bleu", "cider", "rouge", "meteor", "spice")


def choose(
    task: str,
    metric: str,
    docs: Sequence[Mapping[str, Any]],
    native: Adapter,
    score: Callable[[list[str]], float],
    *,
    higher_is_better: bool = True,
    override: str | None = None,
) -> Candidate:
    """Choose how to get gold answers, and prove it: scored as answers they must come close to the maximum.

    Args:
        task: the task's name, looked up in `BY_NAME`.
        metric: the metric that `score` gives; for a caption metric, lists of texts are captions.
        docs: the first documents of the task, without images.
        native: the task's own `doc_to_target`.
        score: the aggregated metric of these documents, given one answer per document.
        higher_is_better: whether a higher metric is better.
        override: a column, or a Jinja template over the columns; then nothing else is tried.

    Raises: TaskError naming what was tried and how to name the target.
    """
    candidates = _candidates(task, metric, docs[0], native, override)
    nonsense = score([NONSENSE] * len(docs))
    tried: list[tuple[Candidate, float | str]] = []
    for candidate in candidates:
        value = _tried(candidate, docs, score)
        tried.append((candidate, value))
        if candidate.named and isinstance(value, float) and _proves(value, nonsense, value, higher_is_better):
            return candidate
    best = max((value for _, value in tried if isinstance(value, float)), default=0.0)
    for candidate, value in tried:
        if isinstance(value, float) and _proves(value, nonsense, best, higher_is_better):
            return candidate
    raise TaskError(_unproven(task, metric, tried, nonsense, docs[0], override))


def is_named(task: str) -> bool:
    """Whether a task has an adapter in `BY_NAME`."""
    return bool(_named(task, alternatives, None))


def unproven(task: str, doc: Mapping[str, Any], override: str | None) -> Candidate:
    """The gold answer of a task that no metric proves, which must be named, by `override` or in `BY_NAME`.

    Raises: TaskError when it is not named.
    """
    named = _named(task, alternatives, override)
    if not named:
        raise TaskError(
            f"task {task} has no metric that can prove a gold answer: name its column or a template with "
            f"--target; the columns are {', '.join(map(str, doc))}"
        )
    source = f"--target {override}" if override is not None else named[0].name
    return Candidate(f"{source}, which no score proves", named[0].adapter, True)


def _tried(
    candidate: Candidate, docs: Sequence[Mapping[str, Any]], score: Callable[[list[str]], float]
) -> float | str:
    """The score of a candidate's gold answers, or why there is none.

    A document without a gold answer counts as answered by nonsense; later, such documents are counted.
    """
    answers, why = [], ""
    for doc in docs:
        try:
            answers.append(candidate.adapter(doc).references[0])
        except (LookupError, TypeError, ValueError) as error:
            answers.append(NONSENSE)
            why = f"no text ({type(error).__name__})"
        except TemplateError as error:
            return f"not a template over the columns ({error})"
        except TaskError as error:
            return str(error)
    if all(answer == NONSENSE for answer in answers):
        return why
    try:
        return float(score(answers))
    except (LookupError, TypeError, ValueError) as error:
        return f"cannot be scored ({type(error).__name__})"
    except TaskError as error:
        return str(error)


def _proves(value: float, nonsense: float, best: float, higher_is_better: bool) -> bool:
    """Close to the maximum: half of 1, or half of the best candidate where the metric has another scale."""
    if not higher_is_better:
        return value <= 0.5 * nonsense and value < nonsense
    return value > nonsense and value >= 0.5 and value >= 0.5 * best


def _candidates(
    task: str, metric: str, doc: Mapping[str, Any], native: Adapter, override: str | None
) -> list[Candidate]:
    several = captions if _of_captions(metric) else alternatives
    found = _named(task, several, override)
    if override is not None:
        return found
    found.append(Candidate("doc_to_target", native))
    return found + [Candidate(f"column {name}", several(name)) for name in COLUMNS if name in doc]


def _named(task: str, several: Callable[[str], Adapter], override: str | None) -> list[Candidate]:
    """The candidate that `override` names, or else the first for the task in `BY_NAME`; empty for none."""
    if override is not None:
        return [Candidate(override, _template(override) if "{{" in override else several(override), True)]
    known = [Candidate(f"the adapter of {name}", way, True) for name, way in BY_NAME if fnmatch(task, name)]
    return known[:1]


def _of_captions(metric: str) -> bool:
    return any(word in metric.lower() for word in CAPTION_METRICS)


def _template(template: str) -> Adapter:
    return lambda doc: _single(apply_template(template, dict(doc)))


def _unproven(
    task: str,
    metric: str,
    tried: Sequence[tuple[Candidate, float | str]],
    nonsense: float,
    doc: Mapping[str, Any],
    override: str | None,
) -> str:
    what = "; ".join(
        f"{candidate.name}: {value if isinstance(value, str) else format(value, '.3g')}"
        for candidate, value in tried
    )
    wanted = "another" if override else "the"
    return (
        f"could not find the gold answer of task {task}. Candidates scored with {metric} (nonsense answers "
        f"get {nonsense:.3g}): {what}. Name {wanted} column or a template with --target; "
        f"the columns are {', '.join(map(str, doc))}"
    )


def most_common(texts: Sequence[str]) -> Gold:
    """The most common text as target (the first of equals); the references are ordered by frequency."""
    counts = Counter(texts)
    ordered = sorted(counts, key=lambda text: -counts[text])
    return Gold(ordered[0], ordered)


def joined(texts: Sequence[str]) -> Gold:
    """Up to five texts joined as target, and each as a reference."""
    kept = list(texts)[:MOST_REFERENCES]
    if not kept:
        raise LookupError("no text")
    return Gold(" ".join(kept), kept)


def _single(text: str) -> Gold:
    if not text.strip():
        raise LookupError("no text")
    return Gold(text.strip(), [text.strip()])


def texts_in(value: Any) -> list[str]:
    """The texts in a column: a text, a list, or dicts of annotations in either of the forms of `datasets`.

    Raises: LookupError when there is none.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("answer", "caption", "text", "raw") if key in value), None)
        return texts_in(value)
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_in(item)]
    if isinstance(value, str) and value.strip():
        return [value.strip()]
    if isinstance(value, Real):
        return [str(value)]
    raise LookupError("no text")


def choices_of(task: Task, doc: Mapping[str, Any]) -> list[str]:
    """The choices that a multiple-choice task offers for a document."""
    return [str(choice).strip() for choice in task.doc_to_choice(dict(doc))]


def native_gold(task: Task, doc: Mapping[str, Any]) -> Gold:
    """The task's own `doc_to_target`; where it is the position of a choice, or of several, their texts."""
    found = task.doc_to_target(dict(doc))
    if getattr(task.config, "doc_to_choice", None) is not None:
        several = found if isinstance(found, list) else [found]
        if all(isinstance(position, int) for position in several):
            texts = task.doc_to_choice(dict(doc))
            found = [texts[position] for position in several]
    return most_common(texts_in(found))
