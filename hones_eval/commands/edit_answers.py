"""Whether a model's answer flips from a clean image to the edited one."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from lmms_eval.api.instance import unwrap_generation_output
from lmms_eval.api.model import lmms

from hones_eval.choices import Category
from hones_eval.editing.run import Report, write_tables
from hones_eval.editing.work import EditSettings
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, load_lmm

CATEGORIES: tuple[str, ...] = get_args(Category)


def count_flips(report: Report, out: Path, settings: EditSettings, model: str, model_args: str) -> Report:
    """Ask a model every accepted question about both images, by the tasks `vseam_*` and `vseam_*_edited`.

    An edit stays accepted when the model gives the clean answer to the clean image and the edited answer to
    the edited one. `vseam_pairs.json` and the rows record the model's answers.
    """
    lmm = load_lmm(model, model_args)
    rows = {row["question_id"]: dict(row) for row in report.accepted}
    categories = [name for name in CATEGORIES if any(row["category"] == name for row in rows.values())]
    if not categories:
        raise HonesError(f"no accepted edit is of a category that has a task ({', '.join(CATEGORIES)})")
    with _data(out):
        for category in categories:
            for key, task in (
                ("model_clean", f"vseam_{category}"),
                ("model_edited", f"vseam_{category}_edited"),
            ):
                for question_id, answer in _answers(lmm, task, model):
                    rows[question_id][key] = answer
    judged = [_judged(row) for row in rows.values()]
    flipped = report._replace(
        accepted=[row for row in judged if row["accepted"]],
        rejected=report.rejected + [row for row in judged if not row["accepted"]],
    )
    write_tables(flipped, out, settings)
    return flipped


def _answers(lmm: lmms, task: str, model: str) -> Iterator[tuple[str, str]]:
    """Each question's id and the model's answer, by lmms-eval's own prompt and decoding."""
    examples = TaskExamples(lmm, task, model_name=model)
    indices = range(len(examples))
    outputs = lmm.generate_until([examples._request(index) for index in indices])
    for index, output in zip(indices, outputs, strict=True):
        yield str(examples.document(index)["question_id"]), str(unwrap_generation_output(output)[0])


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    reasons = []
    for key, wanted in (("model_clean", row["answer"]), ("model_edited", row["edited_answer"])):
        if key in row and _word(row[key]) != wanted.lower():
            shown = "clean" if key == "model_clean" else "edited"
            reasons.append(f"the model answers {row[key]!r} for the {shown} image, not {wanted}")
    return row | {"accepted": not reasons, "reasons": reasons}


def _word(answer: str) -> str:
    """The first word of an answer, in lower case."""
    found = re.search(r"[a-z]+", answer.lower())
    return found[0] if found else ""


@contextmanager
def _data(folder: Path) -> Iterator[None]:
    """Let the tasks read `folder`."""
    before = os.environ.get("HONES_EVAL_DATA")
    os.environ["HONES_EVAL_DATA"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["HONES_EVAL_DATA"]
        else:
            os.environ["HONES_EVAL_DATA"] = before
