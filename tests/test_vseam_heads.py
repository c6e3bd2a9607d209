"""V-SEAM's head scores: standard errors, subset sizes, subsets that are empty, questions on one picture."""

import statistics
from collections.abc import Callable, Sequence

import plain
import pytest
import torch
from families import Family
from PIL import Image

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.errors import TaskError
from hones_eval.lmms.examples import Example
from hones_eval.methods.vseam import HeadContribution
from hones_eval.runs.measure import Totals

COLOURS = ("red", "green", "blue", "yellow", "white")


class Questions:
    """Examples, of which those on one picture go together, as `TaskExamples` has them."""

    def __init__(self, some: Sequence[Example]) -> None:
        self.some = some

    def with_same_images(self, index: int) -> list[Example]:
        picture = next(one.image_hashes for one in self.some if one.index == index)
        return [one for one in self.some if one.image_hashes == picture]


def examples(
    family: Family,
    rights: Sequence[bool | None],
    colours: Sequence[str] = COLOURS,
    question: str = "What is it?",
) -> list[Example]:
    """Examples whose target is the likeliest token, another one, or (None) nothing at all."""
    made = []
    for index, right in enumerate(rights):
        picture = Image.new("RGB", (40, 30), colours[index])
        inputs = dict(family.inputs(question.format(index), [picture]))
        likeliest = int(plain.forward(family.model, inputs).logits[-1].argmax())
        ids = [] if right is None else [likeliest if right else (likeliest + 7) % 50 + 20]
        made.append(Example(index, "drawn", "test", index, inputs, {}, "x", ["x"], ids, [colours[index]], ""))
    return made


def measured(family: Family, some: Sequence[Example]) -> Totals:
    method = HeadContribution(Replayer(Anatomy.of(family.model)), Questions(some))  # type: ignore[arg-type]
    sums, records = method.zeros(), {}
    for one in some:
        result = method.measure(one)
        sums = {name: value + result.sums[name] for name, value in sums.items()}
        records[one.index] = result.record
    return Totals(sums, records)


@pytest.fixture
def family(build_family: Callable[[str], Family]) -> Family:
    return build_family("llava")


def test_standard_errors_are_those_of_each_subset(family: Family) -> None:
    some = examples(family, [True, False, True, False, True])
    totals = measured(family, some)
    drops: dict[tuple[int, int], list[float]] = {}
    for one in some:
        base = torch.softmax(plain.forward(family.model, one.inputs).logits[-1], -1)[one.target_ids[0]]
        for head in plain.all_heads(family.model):
            logits = plain.forward(family.model, one.inputs, head).logits[-1]
            drops.setdefault((head.layer, head.site), []).append(
                float(base - torch.softmax(logits, -1)[one.target_ids[0]])
            )
    errors = HeadContribution.standard_errors(totals)
    for head, values in drops.items():
        subsets = {
            "signed": values,
            "positive": [max(0.0, values[i]) for i in (0, 2, 4)],
            "negative": [max(0.0, -values[i]) for i in (1, 3)],
        }
        for kind, subset in subsets.items():
            expected = statistics.stdev(subset) / len(subset) ** 0.5
            assert float(errors[kind][head]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    report = HeadContribution.report(totals, 3)
    assert (report["correct_examples"], report["incorrect_examples"]) == (3, 2)
    assert report["warnings"] == []
    best = report["top_positive"][0]
    assert best["standard_error"] == float(errors["positive"][tuple(best["head"])])
    assert len(report["top_positive"]) == 3


@pytest.mark.parametrize(("right", "missing"), [(True, "incorrect"), (False, "correct")])
def test_a_category_with_no_correct_or_no_incorrect_example_says_so(
    family: Family, right: bool, missing: str
) -> None:
    totals = measured(family, examples(family, [right, right]))
    report = HeadContribution.report(totals, 3)
    kind = {"incorrect": "negative", "correct": "positive"}[missing]
    assert report["warnings"] == [
        f"no example is {missing}, so {kind} scores are not measured and are stored as 0"
    ]
    assert report[f"top_{kind}"] == []
    assert report["standard_errors"][kind] is None
    assert not HeadContribution.scores(totals)[kind].any()


def test_answers_without_tokens_are_counted_and_named(family: Family) -> None:
    some = examples(family, [True, None, False, None])
    totals = measured(family, some)
    report = HeadContribution.report(totals, 3)
    assert report["examples_without_answer_tokens"] == ["drawn, doc_id 1", "drawn, doc_id 3"]
    assert "skipped 2 examples whose answers have no tokens" in report["warnings"][0]
    with_tokens = measured(family, [some[0], some[2]])
    for kind, scores in HeadContribution.scores(totals).items():
        assert torch.equal(scores, HeadContribution.scores(with_tokens)[kind])
    with pytest.raises(
        TaskError, match="none of 2 examples has an answer with tokens; the first is drawn, doc_id 1"
    ):
        HeadContribution.report(measured(family, [some[1], some[3]]), 3)


def test_questions_on_one_picture_share_the_work_up_to_where_they_differ(family: Family) -> None:
    colours = ("red", "red", "red", "blue", "blue", "green")
    some = examples(family, [True, None, False, True, True, False], colours, "What is number {}, and why?")
    totals = measured(family, some)
    assert totals.sums["shared"] == 4  # of the five on pictures with others one has no answer
    items = [plain.Item(one.inputs, {}, one.target_ids) for one in some if one.target_ids]
    expected = plain.vseam_heads(family.model, items)
    assert expected["correct"] == totals.sums["correct"] == 3
    for kind, scores in HeadContribution.scores(totals).items():
        worst = (scores.double() - expected[kind]).abs().max() / expected[kind].abs().max()
        assert worst <= 1e-5, (kind, worst)
