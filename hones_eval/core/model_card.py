"""The model card of a steering on the Hugging Face hub, made from its provenance and from rows of a board."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hones_eval.core.artifact import Provenance
from hones_eval.core.files import exists
from hones_eval.version import __version__

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TAGS = ("steering", "activation-steering", "interpretability", "vision-language-model")
NO_BOARD = (
    "No board was given, so nothing is known about whether this steering helps. Evaluate the model with "
    "lmms-eval, with and without it, and compare both runs with `hones-eval leaderboard`."
)
NOT_TOLD = ("model_args", "model", "warnings")
"""Settings that name the paths of a machine, or that are shown elsewhere."""


def model_card(
    source: Provenance,
    counts: Mapping[str, int],
    digest: str,
    repo_id: str,
    rows: Sequence[Mapping[str, str]] = (),
    licence: str | None = None,
) -> str:
    """The card, Markdown with the metadata that the hub indexes.

    Args:
        source: the provenance of the steering.
        counts: how many heads and neurons it scales and shifts, as in `Steering.counts`.
        digest: of its scales and shifts.
        repo_id: where, for the lines that say how to use it.
        rows: rows of `leaderboard.csv` with this steering.
        licence: as the hub names licences, such as apache-2.0; None names none.
    """
    base = source.base_model if is_hub_id(source.base_model) else None
    data = ModelCardData(
        base_model=base,
        library_name="hones-eval",
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, _tag(source.method)],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {repo_id.rpartition('/')[2]}", _what(source, counts, base)]
    parts += ["## How it was made", _table(_made(source, digest)), "## What it does", _results(rows)]
    parts += ["## Use", _use(repo_id, base), f"Written by hones-eval {__version__}."]
    return "\n\n".join(parts) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a model's name has the form of a hub id, and is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not exists(name)


def _tag(method: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-") or "steering"


def _what(source: Provenance, counts: Mapping[str, int], base: str | None) -> str:
    parts = [f"{counts['scaled_heads']} attention heads", f"{counts['scaled_neurons']} FFN neurons"]
    parts += [f"{count} shifts of {name[8:]}" for name, count in counts.items() if name.startswith("shifted")]
    model = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(source.base_model).name}`"
    return (
        f"A steering of {model} for hones-eval: it changes {', '.join(parts)} at inference time. The model's "
        "weights are not part of it."
    )


def _made(source: Provenance, digest: str) -> list[tuple[str, str]]:
    sets = [f"{part.task} ({part.split}), {part.count} examples" for part in source.examples]
    settings = [f"{name} {value}" for name, value in source.settings.items() if name not in NOT_TOLD]
    rows = [
        ("Base model", source.base_model if is_hub_id(source.base_model) else Path(source.base_model).name),
        ("Revision", source.revision or ""),
        ("Digest of its weights", source.weights or ""),
        ("Adapter", source.adapter or ""),
        ("Method", source.method),
        ("Settings", ", ".join(settings)),
        ("Chosen on", "; ".join(sets) or "no examples"),
        ("Ranking", str((source.ranking or {}).get("digest", ""))),
        ("Digest of the scales", digest),
    ]
    return [(name, value) for name, value in rows if value]


def _results(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return NO_BOARD
    names = ("task", "metric", "n", "baseline", "steered", "difference", "low", "high", "verdict")
    head = "| " + " | ".join(names) + " |\n|" + "---|" * len(names)
    lines = [head, *("| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows)]
    text = (
        "Compared with the baseline on a leaderboard of hones-eval; `low` and `high` are the 95 % interval "
        "of the difference. Rows of tasks that it was not chosen for are its side effects."
    )
    return text + "\n\n" + "\n".join(lines)


def _use(repo_id: str, base: str | None) -> str:
    model = base or "BASE_MODEL"
    return (
        f"```bash\nlmms-eval --model hones --model_args base=llava_hf,pretrained={model},steering={repo_id} "
        f"--tasks gqa\n```\n\n```python\nfrom hones_eval import Steering, steer\n\n"
        f'with steer(model, Steering.load("{repo_id}")):\n    model.generate(**inputs)\n```'
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)


def _cell(value: Any) -> str:
    """A text as one cell of a Markdown table."""
    text = " ".join(str(value).split())[:500]
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
