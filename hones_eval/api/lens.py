"""The logit lens: what every layer would answer, on the examples of a task."""

from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.api.model import Model
from hones_eval.core.adapters import model_source
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance, write_json, write_text
from hones_eval.core.attach import steer
from hones_eval.core.files import matching, staged_folder
from hones_eval.core.lock import writes_to_out
from hones_eval.core.steering import Steering
from hones_eval.core.weights import weights_digest
from hones_eval.engine import tokens
from hones_eval.engine.activations import VIEWS
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.tokens import tokenizer_of
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.lens import LogitLens, Other, Readout, Seen
from hones_eval.reports import figures, lens_figures
from hones_eval.reports.trace_tables import csv_text
from hones_eval.runs.measure import Totals
from hones_eval.version import __version__

HEADER = ["example", "doc_id", "model", "view", "layer", "position", "token", "entropy", "answer_probability"]


def other_steering(against: str | None, strength: float) -> Steering | None:
    """The steering that `--against steering=...` names, read before the model is loaded.

    Raises: HonesError when --against or --strength make no sense.
    """
    steering = _steering(against)
    if strength != 1 and steering is None:
        raise HonesError(
            f"--strength {strength:g} only applies to a steering: give --against steering=FOLDER"
        )
    return steering


@writes_to_out
def lens(
    model: Model,
    tasks: str,
    out: Path,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    positions: str = "last",
    top: int = 10,
    against: str | None = None,
    steering: Steering | None = None,
    strength: float = 1.0,
    figures_of: int = 8,
) -> list[str]:
    """Unembed every layer's states on the examples of a task, and write tables and figures.

    Returns: the answer in a few lines.
    Raises: HonesError for positions that a prompt does not have, or a task that generates nothing.
    """
    examples = model.examples(
        tasks, include_path=include_path, limit=limit, offset=offset, gen_kwargs=gen_kwargs
    )
    tokenizer = tokenizer_of(model.lmm)
    other = None if against is None else _other(model, against, steering, strength)
    method = LogitLens(model.anatomy, tokenizer, positions, top, other)
    totals = model.loop.run(examples, cast(Any, method), f"lens {tasks}")
    if not model.loop.is_first:
        return []
    settings = model.settings(examples, positions=positions, top=top, against=against, strength=strength)
    return _write(out, model, examples, tokenizer, totals, settings, figures_of)


def _steering(against: str | None) -> Steering | None:
    """The steering that `--against steering=...` names, read before the model is."""
    given = dict(part.partition("=")[::2] for part in (against or "").split(","))
    if given.keys() - {"steering", "strength", "attach", "allow_noop"} or not against:
        return None
    if len(given) > 1 or not given.get("steering"):
        raise HonesError(
            f"--against {against}: give either a steering alone, --against steering=FOLDER, with its "
            "strength given by --strength; or all model_args of another model, pretrained=..."
        )
    return Steering.load(given["steering"])


def _other(job: Model, against: str, steering: Steering | None, strength: float) -> Other:
    """The same model with a steering, or another model of the same wrapper."""
    if steering is not None:
        return Other(job.anatomy, partial(steer, job.anatomy.model, steering, strength=strength))
    model: Any = inner_model(load_lmm(job.name, against))
    return Other(Anatomy.of(model.to(job.anatomy.model.dtype)))


def _write(
    out: Path,
    job: Model,
    examples: TaskExamples,
    tokenizer: PreTrainedTokenizerBase,
    totals: Totals,
    settings: dict[str, Any],
    figures_of: int,
) -> list[str]:
    seen: list[Seen] = [totals.records[index] for index in sorted(totals.records)]
    count = totals.sums["examples"]
    means = {name: total / count for name, total in totals.sums.items() if name != "examples"}
    provenance = Provenance(
        **model_source(job.anatomy.model),
        shape=job.anatomy.shape,
        method="lens",
        weights=weights_digest(job.anatomy.model),
        settings=settings,
        examples=[examples.example_set()],
    )
    by_view = {name: dict(zip(VIEWS, mean.tolist(), strict=True)) for name, mean in means.items()}
    report = {"format": "hones-eval lens", "package_version": __version__, "means": by_view}
    texts = _Texts(tokenizer)
    rows = [row for example in seen for row in _rows(example, texts)]
    tops = [
        f"{what}_{rank + 1}"
        for rank in range(seen[0].readout.top_ids.shape[-1])
        for what in ("token", "probability")
    ]
    drawn = {name: mean.numpy() for name, mean in means.items()}
    with staged_folder(out, last=("lens.json",), stale=matching("example[0-9]*.png")) as folder:
        write_json(folder / "lens.json", report | provenance.to_json())
        write_text(folder / "lens.csv", csv_text([*HEADER, *tops], rows))
        figures.save(lens_figures.mean_figure(drawn, int(count)), folder / "means.png")
        for example in seen[:figures_of]:
            _draw(folder, job.anatomy, examples, example, texts, tokenizer)
    return [
        f"wrote {out / 'lens.json'}, lens.csv and {min(figures_of, len(seen))} figures: "
        f"{int(count)} examples",
        *_findings(by_view),
    ]


def _findings(means: dict[str, dict[str, list[float]]]) -> list[str]:
    """From which layer on the answer shows, and where the other model differs most."""
    block = means["answer"]["block"]
    half = next((layer for layer, value in enumerate(block) if value >= block[-1] / 2), len(block) - 1)
    lines = [
        f"the answer's mean probability is {block[-1]:.3g} after the last layer, and reaches half of that at "
        f"layer {half}"
    ]
    if "divergence" in means:
        change = means["divergence"]["block"]
        most = max(range(len(change)), key=change.__getitem__)
        lines.append(f"the other model differs most at layer {most}: divergence {change[most]:.3g}")
    return lines


class _Texts:
    """The text of single tokens, cached."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = str(self._tokenizer.decode([token]))
        return self._known[token]

    def likeliest(self, ids: Tensor) -> list[list[list[str]]]:
        """Texts of the first of `ids` [views, L, P, k]."""
        return [[[self.of(token) for token in row] for row in layers] for layers in ids[..., 0].tolist()]


def _rows(seen: Seen, texts: _Texts) -> list[list[Any]]:
    rows = []
    for model, readout in (("model", seen.readout), ("other", seen.other)):
        if readout is None:
            continue
        for place, view in enumerate(VIEWS):
            for layer in range(readout.entropy.shape[1]):
                for at, (position, token) in enumerate(zip(seen.positions, seen.tokens, strict=True)):
                    label = [seen.index, seen.doc_id, model, view, layer, position, token]
                    rows.append(label + _cells(readout, (place, layer, at), texts))
    return rows


def _cells(readout: Readout, place: tuple[int, int, int], texts: _Texts) -> list[Any]:
    cells: list[Any] = [float(readout.entropy[place]), float(readout.answer[place])]
    for token, p in zip(
        readout.top_ids[place].tolist(), readout.top_probabilities[place].tolist(), strict=True
    ):
        cells += [texts.of(token), p]
    return cells


def _draw(
    out: Path,
    anatomy: Anatomy,
    examples: TaskExamples,
    seen: Seen,
    texts: _Texts,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    inputs = examples[seen.index].inputs
    text = inputs["input_ids"][0, tokens.positions(anatomy, inputs)[1]].tolist()
    prompt = "".join(tokens.token_texts(tokenizer, text))
    images = examples.images(seen.index)
    likeliest = texts.likeliest(seen.readout.top_ids)
    drawn = lens_figures.lens_figure(seen, likeliest, images, prompt)
    figures.save(drawn, out / f"example{seen.index}.png")
    if seen.other is not None:
        drawn = lens_figures.difference_figure(seen, likeliest, images, prompt)
        figures.save(drawn, out / f"example{seen.index}_difference.png")
