"""Write the checkpoint's card from lmms-eval's own logs: `python -m hones_eval.toy.card LOGS --run RUN`.

Copies the trained checkpoint of RUN into the package with the hash of its weights, the training log, the
learning curve, and a card whose figures all come from the samples files under LOGS.
"""

import csv
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from hones_eval.core.artifact import write_text
from hones_eval.errors import HonesError
from hones_eval.toy import scoring
from hones_eval.toy.documents import Document, documents

T = TypeVar("T")
_PACKAGE = Path(__file__).resolve().parent
_MEASURED = ("", "_edited", "_shifted")


class Sample(NamedTuple):
    """One example and the model's answer."""

    document: Document
    answer: str


class Row(NamedTuple):
    """A value with its 95 % interval over `n` examples (queries for NDCG)."""

    name: str
    value: float
    low: float
    high: float
    n: int


def main(logs: Path, run: Path = Path("runs/toy"), package: Path = _PACKAGE) -> None:
    """Copy a trained checkpoint into the package and write its card.

    Args:
        logs: lmms-eval's output folder, made with --log_samples for the scenes tasks.
        run: the folder of `hones_eval.toy.train`.
        package: the folder that gets checkpoint/, training_log.csv and learning_curve.png.
    """
    folder = package / "checkpoint"
    shutil.copytree(run / "checkpoint", folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    write_text(folder / "model.safetensors.sha256", f"{_sha256(weights)}  {weights.name}\n")
    shutil.copyfile(run / "training_log.csv", package / "training_log.csv")
    draw_curve(package / "training_log.csv", package / "learning_curve.png")
    write_text(folder / "README.md", card(logs))
    print(f"wrote {folder}, training_log.csv and learning_curve.png")


def card(logs: Path) -> str:
    """The card in Markdown, with one table per variant."""
    titles = {"": "Test split", "_edited": "Test split, edited images", "_shifted": "Test split, shifted"}
    tables = [f"## {titles[variant]}\n\n{_table(figures(logs, variant))}" for variant in _MEASURED]
    return (_PACKAGE / "card_template.md").read_text(encoding="utf-8").replace("{tables}", "\n".join(tables))


def figures(logs: Path, variant: str) -> list[Row]:
    """All figures of one variant of the tasks, from the newest samples file of each.

    Raises:
        HonesError: a task has no samples under `logs`.
    """
    rows = []
    for task in ("vqa_object", "vqa_attribute", "vqa_relation"):
        samples = read_samples(logs, task, variant)
        rows.append(_proportion(f"{task}, all", [_exact(sample) for sample in samples]))
        for kind in dict.fromkeys(sample.document.kind for sample in samples):
            of_kind = [_exact(sample) for sample in samples if sample.document.kind == kind]
            rows.append(_proportion(f"{task}, {kind}", of_kind))
    ocr = read_samples(logs, "ocr", variant)
    rows.append(_proportion("ocr, exact match", [_exact(sample) for sample in ocr]))
    rows.append(_resampled("ocr, ANLS", [scoring.anls(s.answer, s.document.answer) for s in ocr], _mean))
    captions = read_samples(logs, "caption", variant)
    counts = [scoring.bleu_counts(caption.answer, tuple(caption.document.references)) for caption in captions]
    rows.append(_resampled("caption, BLEU-4", counts, scoring.bleu_of_counts))
    queries = _queries(read_samples(logs, "retrieval", variant))
    rows.append(_resampled("retrieval, NDCG@5", [_ndcg(query) for query in queries], _mean))
    overlaps = [_iou(sample) for sample in read_samples(logs, "grounding", variant)]
    rows.append(_proportion("grounding, IoU at least 0.5", [value >= 0.5 for value in overlaps]))
    rows.append(_resampled("grounding, mean IoU", overlaps, _mean))
    return rows


def read_samples(logs: Path, task: str, variant: str) -> list[Sample]:
    """Read the newest samples file of a test-split task and pair each answer with its example."""
    found = sorted(logs.rglob(f"*_samples_scenes_{task}{variant}.jsonl"))
    if not found:
        raise HonesError(
            f"no samples of scenes_{task}{variant} under {logs}; run lmms-eval with --log_samples"
        )
    lines = [json.loads(line) for line in found[-1].read_text(encoding="utf-8").splitlines()]
    made = documents(task, variant.removeprefix("_") or "plain", "test", len(lines))  # type: ignore[arg-type]
    by_id = {line["doc_id"]: line for line in lines}
    for index, document in enumerate(made):
        if by_id[index]["target"] != document.answer:
            raise HonesError(
                f"{found[-1]} line {index} was made by another version of the scenes; run lmms-eval again"
            )
    return [Sample(document, by_id[index]["filtered_resps"]) for index, document in enumerate(made)]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    z, share = 1.959964, right / n
    middle, spread = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - spread) / (1 + z**2 / n), (middle + spread) / (1 + z**2 / n)


def draw_curve(log: Path, image: Path) -> None:
    """The loss and the development accuracy of every topic against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["describe"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), dpi=90, layout="constrained")
    left.semilogy([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows])
    left.set(xlabel="step", ylabel="training loss")
    for number, topic in enumerate([name for name in rows[0] if name not in ("step", "seconds", "loss")]):
        steps = [int(row["step"]) for row in measured]
        style = "-" if number < 7 else "--"
        right.plot(steps, [float(row[topic]) for row in measured], style, label=topic.replace("_", " "))
    right.set(xlabel="step", ylabel="exact answers, development", ylim=(0, 1.02))
    right.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(image)
    pyplot.close(figure)


def _table(rows: list[Row]) -> str:
    lines = [f"| {r.name} | {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | {r.n} |" for r in rows]
    return "\n".join(["| figure | value | 95 % interval | n |", "|---|---:|---:|---:|", *lines]) + "\n"


def _proportion(name: str, right: Sequence[bool]) -> Row:
    return Row(name, sum(right) / len(right), *wilson(sum(right), len(right)), len(right))


def _resampled(name: str, items: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> Row:
    """Percentile interval of 200 bootstrap samples, for values that are not proportions."""
    rng = random.Random(0)
    draws = sorted(statistic(rng.choices(items, k=len(items))) for _ in range(200))
    return Row(name, statistic(items), draws[5], draws[194], len(items))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exact(sample: Sample) -> bool:
    return scoring.exact(sample.answer, sample.document.answer) == 1


def _iou(sample: Sample) -> float:
    answer = scoring.parse_box(sample.document.answer)
    assert answer is not None
    return scoring.iou(scoring.parse_box(sample.answer), answer)


def _queries(samples: list[Sample]) -> list[list[Sample]]:
    numbers = dict.fromkeys(sample.document.query for sample in samples)
    return [[sample for sample in samples if sample.document.query == number] for number in numbers]


def _ndcg(query: list[Sample]) -> float:
    positive = [sample.document.answer for sample in query].index("Yes")
    return scoring.ndcg([scoring.exact(sample.answer, "Yes") for sample in query], positive)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
