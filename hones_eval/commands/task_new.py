"""`hones-eval task new`."""

from pathlib import Path

from hones_eval.choices import TaskKind
from hones_eval.commands.answer import Answer


def task_new(
    csv: Path,
    images: Path,
    out: Path,
    name: str | None = None,
    kind: TaskKind = "auto",
    prompt: str | None = None,
) -> Answer:
    """Write an lmms-eval task from a table of your own images, after checking every row.

    Args:
        csv: the table, CSV in UTF-8 with a header or JSON lines (.jsonl); one row per question or caption.
        images: the folder that the table's image column is relative to.
        out: the folder to write the task files to, for --include_path.
        name: the task's name; by default the table's file name.
        kind: question (columns question, answer), choice (question, answer, choices), caption (caption) or
            box (phrase, box); auto decides by the columns. Several answers, choices or captions in one cell
            are separated by |.
        prompt: the prompt, with names of columns in braces; by default the prompt of the HONES paper.

    Example:
        hones-eval task new --csv photos.csv --images photos --out tasks
    """
    from hones_eval.jobs.new_task import new_task

    made = new_task(csv, images, out, name, kind, prompt)
    lines = [f"warning: {warning}" for warning in made.warnings]
    lines.append(f"{made.kind} task over {made.images} images, in splits that share no image:")
    lines += [f"  {task}: {count} example{'' if count == 1 else 's'}" for task, count in made.splits.items()]
    lines.append(f"wrote {out}; use it with --include_path {out} --tasks {made.name}_discovery")
    return Answer(lines, {"out": str(out), **made.__dict__})
