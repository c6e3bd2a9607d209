"""The board as web pages: a self-contained index, and one page per comparison."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from hones_eval.leaderboard.board import NONE_STEERED, Board
from hones_eval.leaderboard.drawing import heads_svg, neurons_svg
from hones_eval.leaderboard.example_images import ExampleImages, boxes_on
from hones_eval.leaderboard.examples import examples_of
from hones_eval.leaderboard.identity import SteeringRef
from hones_eval.leaderboard.pairing import Pair
from hones_eval.leaderboard.pooling import Pooled
from hones_eval.leaderboard.rows import CORPUS_RESAMPLES, Row
from hones_eval.leaderboard.scales import Scales, read_scales
from hones_eval.leaderboard.text import number, one_line, probability, shown
from hones_eval.leaderboard.views import (
    CSS,
    SIGNS,
    clearest_first,
    matrix_view,
    method_views,
    pair_id,
    summary,
    tested_rows,
)
from hones_eval.pages.rendering import render
from hones_eval.stats.paired import FEW_DIFFERENT
from hones_eval.stats.verdicts import CORRECTIONS

MOST_EXAMPLES, LEAST_EXAMPLES, ALL_EXAMPLES = 10_000, 50, 100_000  # per page: at most, at least; in all
FIRST = 25  # shown at a time, and without JavaScript


def index_page(board: Board, views: Sequence[Mapping[str, Any]], title: str) -> str:
    """The index page: the table of all rows, the matrix of side effects, and the runs left out."""
    verdicts = Counter(row.verdict for row in board.rows)
    tally = {
        "better": verdicts["better"],
        "worse": verdicts["worse"],
        "unclear": verdicts["no clear difference"],
        "not_judged": verdicts["not judged"],
    }
    return _render(
        "index.html",
        title=one_line(title),
        answer=one_line(board.answer, 600),
        tally=tally,
        runs=board.runs,
        rows=[views[place] for place in clearest_first(board.rows)],
        paged=len({view["page"] for view in views} - {""}),
        comparisons=len({pair_id(row.pair) for row in board.rows}),
        tasks=sorted({view["task"] for view in views}),
        bases=sorted({view["base"] for view in views}),
        metrics=sorted({view["metric"] for view in views}),
        matrix=matrix_view(board, views),
        unranked=[_left_out(left.run.steering, left) for left in board.unranked],
        unreadable=[one_line(line, 400) for line in board.unreadable],
        none_steered=NONE_STEERED if NONE_STEERED in board.warnings else "",
        tested=tested_rows(board),
        few=FEW_DIFFERENT,
        correction=CORRECTIONS[board.correction],
        pooled=[_pooled(row) for row in board.pooled],
        seed=board.seed,
        resamples=board.resamples,
        corpus_resamples=min(CORPUS_RESAMPLES, board.resamples),
        methods=method_views(board),
    )


def _pooled(row: Pooled) -> dict[str, Any]:
    found, interval = row.record(), row.comparison.interval
    ends = None if interval is None else (number(interval.low, sign=True), number(interval.high, sign=True))
    return {
        "steering": one_line(row.label),
        "task": one_line(str(found["task"])),
        "metric": one_line(str(found["metric"])),
        "seeds": found["seeds"],
        "difference": number(row.comparison.difference, sign=True),
        "interval": "" if ends is None else ", ".join(ends),
        "p": probability(row.p_adjusted),
        "verdict": row.verdict,
        "css": CSS.get(row.verdict, ""),
        "sign": SIGNS[row.verdict],
    }


def _left_out(steering: SteeringRef | None, left: Any) -> dict[str, Any]:
    return {
        "name": one_line(left.run.name),
        "task": one_line(left.run.task),
        "steering": "baseline" if steering is None else one_line(steering.label),
        "reasons": [one_line(reason, 300) for reason in left.reasons],
    }


def comparison_pages(
    board: Board, views: Sequence[Mapping[str, Any]], images: ExampleImages
) -> Iterator[tuple[str, str]]:
    """File name and content of each comparison page, for the pairs whose rows link to one."""
    both = [pair for pair in zip(board.rows, views, strict=True) if pair[1]["page"]]
    both.sort(key=lambda pair: pair_id(pair[0].pair))
    groups = [(name, list(group)) for name, group in groupby(both, key=lambda pair: pair_id(pair[0].pair))]
    most = min(MOST_EXAMPLES, max(LEAST_EXAMPLES, ALL_EXAMPLES // max(1, len(groups))))
    tested = tested_rows(board)
    for name, group in groups:
        rows = [row for row, _ in group]
        yield f"{name}.html", _comparison(rows, [view for _, view in group], tested, most, images)


def _comparison(
    rows: Sequence[Row],
    views: Sequence[Mapping[str, Any]],
    tested: int,
    most: int,
    images: ExampleImages,
) -> str:
    pair = rows[0].pair
    examples = examples_of(rows, most)
    found = images.of(pair.steered.task, examples.listed)
    listed, encoded = [], dict[str, dict[str, Any]]()
    for example in examples.listed:
        view = example.to_json() | {"image": "", "boxes": []}
        if image := found.get(example.doc_id):
            key = view["image"] = hashlib.sha256(image.uri.encode()).hexdigest()[:12]
            view["boxes"] = boxes_on(example, image)
            encoded.setdefault(key, image.to_json())
        listed.append(view)
    first = {view["image"] for view in listed[:FIRST]}
    steering = pair.steered.steering
    assert steering is not None
    return _render(
        "comparison.html",
        steering=views[0]["steering"],
        task=views[0]["task"],
        summary=summary(rows[0], tested),
        flags=rows[0].flags,
        notes=rows[0].notes,
        rows=views,
        correction=CORRECTIONS[rows[0].correction],
        n=rows[0].n,
        metric=examples.metric,
        counts=examples.counts,
        examples=listed,
        more=sum(examples.counts.values()) > len(listed),
        images=encoded,
        # Images of the first examples are in the page already, where the script finds them.
        data={key: view | {"uri": ""} if key in first else view for key, view in encoded.items()},
        with_image=len(found),
        first=FIRST,
        facts=_facts(pair, steering),
        **_scales(steering, pair),
    )


def _scales(steering: SteeringRef, pair: Pair) -> dict[str, Any]:
    found = read_scales(steering, pair.steered.results_path)
    if isinstance(found, str):
        return {"scales": [], "no_scales": one_line(found, 300)}
    return {"scales": [_heads(found), _neurons(found), *_shifts(found)], "no_scales": ""}


def _heads(scales: Scales) -> dict[str, str]:
    scaled = int((scales.heads != 1).sum())
    if not scaled:
        return {"image": "", "text": "No head is scaled."}
    up, down = int((scales.heads > 1).sum()), int((scales.heads < 1).sum())
    text = (
        f"Heads: {scaled} of {scales.heads.size} are scaled, {up} up (blue) and {down} down (orange), "
        f"by × {scales.heads.min():.2f} to × {scales.heads.max():.2f}."
    )
    return {"image": heads_svg(scales.heads), "text": text}


def _neurons(scales: Scales) -> dict[str, str]:
    counts = scales.scaled_neurons
    if not any(counts):
        return {"image": "", "text": "No neuron is scaled."}
    fullest = int(np.argmax(counts))
    text = f"Neurons: {sum(counts):,} are scaled, most of them ({counts[fullest]:,}) in layer {fullest}."
    return {"image": neurons_svg(counts), "text": text}


def _shifts(scales: Scales) -> list[dict[str, str]]:
    """How many sites are shifted, that is, get something added; nothing for a steering that only scales."""
    heads, neurons = scales.shifted
    if not heads and not neurons:
        return []
    return [{"image": "", "text": f"Shifts: {heads:,} heads and {neurons:,} neurons get something added."}]


def _facts(pair: Pair, steering: SteeringRef) -> list[tuple[str, str]]:
    run, provenance = pair.steered, steering.provenance
    sets = [
        f"{chosen.get('task')} {chosen.get('split') or ''}, {int(chosen.get('count') or 0):,} examples"
        for chosen in steering.example_sets
    ]
    facts = {
        "Base model": run.base.name + (f" at {run.base.revision}" if run.base.revision else ""),
        "Wrapper": run.wrapper,
        "Steering": steering.path,
        "Digest": steering.digest or "unknown: the run has no manifest",
        "Strength": f"{steering.strength:g}",
        "Attached": steering.attach,
        "Tokens": steering.scope,
        "Condition": "" if steering.condition == "none" else _condition(pair, steering),
        "Method": provenance.get("method"),
        "Settings": _listed(provenance.get("settings")),
        "Chosen on": "; ".join(sets),
        "Baseline run": pair.baseline.name,
        "Steered run": run.name,
        "Seeds": ", ".join(map(str, run.seeds)),
        "Versions": ", ".join(
            f"{name.removesuffix('_version')} {value}" for name, value in run.versions.items()
        ),
    }
    return [(name, shown(value)) for name, value in facts.items() if value]


def _condition(pair: Pair, steering: SteeringRef) -> str:
    counts = steering.acted_on(pair.steered.task)
    return f"{steering.condition}: {counts}" if counts else steering.condition


def _listed(settings: object) -> str:
    if not isinstance(settings, Mapping):
        return ""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _render(template: str, **context: Any) -> str:
    return render("hones_eval.leaderboard", template, "board.js", **context)
