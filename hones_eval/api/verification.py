"""Mask the sites that a ranking selects, on held-out examples."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hones_eval.api.model import Model
from hones_eval.choices import Correction, Sites
from hones_eval.core.artifact import write_json
from hones_eval.core.files import staged_folder
from hones_eval.core.lock import writes_to_out
from hones_eval.core.ranking import Ranking
from hones_eval.jobs.verify import Verification as Job
from hones_eval.jobs.verify import verify as verify_banks


class Verification(Mapping[str, Any]):
    """The result of `verify`: the JSON of verify.json as a mapping, with a readable form."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Keep the report."""
        self._content = dict(content)

    def __getitem__(self, key: str) -> Any:
        """A field of verify.json."""
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        """The names of the fields."""
        return iter(self._content)

    def __len__(self) -> int:
        """How many fields there are."""
        return len(self._content)

    def to_json(self) -> dict[str, Any]:
        """The report as a plain dictionary."""
        return dict(self._content)

    def rows(self) -> list[dict[str, Any]]:
        """One row per masked bank: its size, the metric, the drop and its 95 % interval.

        The banks that the ranking selects come first, then the random ones. Units are the metric's.
        """
        return [
            {
                "bank": name,
                "sites": self["bank_sizes"][name],
                "metric": bank["metric"],
                "drop": bank["metric_drop"]["value"],
                "low": bank["metric_drop"]["low"],
                "high": bank["metric_drop"]["high"],
            }
            for name, bank in self["banks"].items()
        ]

    def to_pandas(self) -> Any:
        """`rows` as a pandas.DataFrame. Raises: HonesError where pandas is not installed."""
        from hones_eval.core.notebook import data_frame

        return data_frame(self.rows())

    def plot(self) -> Any:
        """The figure of verify.png, as a matplotlib.figure.Figure."""
        from hones_eval.reports import figures

        return figures.drops(self._content)

    def lines(self) -> list[str]:
        """The answer in a few lines."""
        name, count = self["metric"], self["examples"]["count"]
        lines = [f"{name} {self['baseline']['metric']:.4g} unedited on {count} examples"]
        for bank, beyond in self["beyond_random"].items():
            found = self["banks"][bank]
            share = found["relative_drop"]["value"]
            relative = "" if share is None else f", {share:.1%} of the score"
            lines.append(
                f"{self['bank_sizes'][bank]} {bank} {self['sites']} masked: {name} {found['metric']:.4g}, "
                f"drop {interval(found['metric_drop'])}{relative}; beyond random banks "
                f"{interval(beyond['metric'])}"
            )
            lines += _verdict(bank, found["metric_drop"])
        random = self["random"]["metric"]
        mean = random.get("pooled")  # reports of older versions have no interval of the mean
        average = f"{random['drop_mean']:.4g}" if mean is None else interval(mean)
        lines.append(f"random banks: drop {average} on average, {random['drop_largest']:.4g} at most")
        return lines + [f"warning: {warning}" for warning in self["warnings"]]

    @property
    def headline(self) -> str:
        """The answer in one sentence."""
        bank = next(iter(self["beyond_random"]))
        found, name = self["banks"][bank], self["metric"]
        verdict, random = found["metric_drop"].get("verdict"), self["random"]["metric"]["drop_mean"]
        return (
            f"Masking {self['bank_sizes'][bank]} {bank} {self['sites']} takes {name} from "
            f"{self['baseline']['metric']:.4g} to {found['metric']:.4g}"
            f"{'' if verdict is None else f' ({verdict})'}; as many random {self['sites']} cost "
            f"{random:.4g} on average"
        )

    def __repr__(self) -> str:
        """The answer in a few lines."""
        return "\n".join(["<hones_eval.Verification>", *self.lines()])

    def _repr_html_(self) -> str:
        from hones_eval.core.notebook import html_table

        return html_table(self.rows(), "; ".join(self.lines()[:1]))


def _verdict(bank: str, drop: Mapping[str, Any]) -> list[str]:
    """A line with the verdict on a bank's drop and its power; none for a report of an older version."""
    if "verdict" not in drop:
        return []
    p = "" if drop.get("p_adjusted") is None else f" (p = {drop['p_adjusted']:.2g} after correction)"
    least = drop.get("detectable")
    power = "no drop" if least is None else f"a drop of {least:.3g} or more"
    units = f"{drop['units']} independent examples"
    return [f"{bank}: {drop['verdict']}{p}; {units} find {power} with probability 0.8"]


@writes_to_out
def verify(
    ranking: Ranking,
    model: Model,
    tasks: str,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    metric: str | None = None,
    target: str | None = None,
    sites: Sites = "auto",
    neurons: float | None = None,
    heads: int = 10,
    trials: int = 5,
    seed: int = 0,
    correction: Correction = "holm",
    scope: str = "all",
    out: Path | None = None,
) -> Verification:
    """Mask the selected sites on held-out examples, and matched random sites for comparison.

    Args:
        ranking: a ranking of this model.
        model: what `load` returned.
        tasks: the lmms-eval task to measure on, with other images than the ranking's.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples.
        offset: skip this many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        metric: the task's metric to use; by default its first that is a number.
        target: the column, or a template, of the gold answer.
        sites: mask `neurons` or `heads`; `auto` is heads for V-SEAM's rankings.
        neurons: the share of all neurons to mask; by default the ranking's.
        heads: how many positive, negative and random heads to mask.
        trials: random banks to compare with, two or more.
        seed: for the random banks and the bootstrap.
        correction: of p-values over the rows: `holm`, or `benjamini_hochberg` for the false discovery rate.
        scope: the tokens at which sites are masked, as in `steer`.
        out: the folder to write verify.json and verify.png to.

    Returns: the drops of the metric by masking, in its units, with paired 95 % intervals over images.
    Raises: HonesError when the ranking does not fit the model or shares images with the examples.

    Examples:
        >>> from hones_eval import load, rank
        >>> from hones_eval.toy import checkpoint_path
        >>> model = load("hones_llava", f"pretrained={checkpoint_path()}")
        >>> ranking = rank(model, "scenes_vqa_relation_discovery", method="random", limit=2)
        >>> found = verify(ranking, model, "scenes_vqa_relation_development", limit=2, trials=2)
        >>> [row["bank"] for row in found.rows()]
        ['selected', 'random 1', 'random 2']
    """
    examples = model.examples(
        tasks,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        metric=metric,
        target=target,
    )
    job = Job(
        ranking, model.replayer, examples, model.loop, sites, neurons, heads, trials, seed, correction, scope
    )
    found = verify_banks(job) | {"settings": model.settings(examples, gen_kwargs=gen_kwargs)}
    verification = Verification(found)
    if out is not None and model.loop.is_first:
        from hones_eval.reports import figures

        with staged_folder(Path(out), last=("verify.json",)) as folder:
            write_json(folder / "verify.json", found)
            figures.save(verification.plot(), folder / "verify.png")
    return verification


def interval(found: Mapping[str, Any]) -> str:
    """An estimate with its 95 % interval, as text."""
    if found["low"] is None:
        return f"{found['value']:.4g}"
    return f"{found['value']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"
