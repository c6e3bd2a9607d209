"""Mask the selected sites on held-out examples and compare with random sites (HONES 3, V-SEAM 3)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from hones_eval.choices import Correction, Sites
from hones_eval.core.artifact import ExampleSet, Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.answers import BASELINE, Answered, AnswersUnder, answered
from hones_eval.methods.banks import check_fits, few_trials, head_banks, neuron_banks
from hones_eval.runs.lightning import Loop
from hones_eval.stats.clusters import by_images
from hones_eval.stats.paired import Floats
from hones_eval.stats.resampling import example_values, resample_means, resample_results
from hones_eval.stats.verdicts import Contrast, Judged, contrast_of_corpus, contrasts_of_values, judge
from hones_eval.version import __version__


@dataclass(frozen=True)
class Verification:
    """The input of `verify`: what to mask, on which examples, and the number of random banks."""

    ranking: Ranking
    replayer: Replayer
    examples: TaskExamples
    loop: Loop
    sites: Sites = "auto"
    neurons: float | None = None
    heads: int = 10
    trials: int = 5
    seed: int = 0
    correction: Correction = "holm"
    scope: str = "all"
    """The tokens at which sites are masked."""


def verify(job: Verification) -> dict[str, Any]:
    """Mask every bank on the examples.

    Returns: a JSON-ready report, the same on every process.
    Raises: HonesError when the ranking does not fit the model, was made from an image of the examples, or
        when there are fewer than two random banks.
    """
    few = few_trials(job.trials)
    check_fits(job.ranking, job.replayer.anatomy.shape, type(job.replayer.anatomy.model).__name__)
    held_out = job.examples.example_set()
    refuse_shared_images(job.ranking.provenance, held_out, "verifying")
    banks = choose_banks(job)
    steerings = {name: masked(job.ranking, bank) for name, bank in banks.items() if bank}
    under = AnswersUnder(job.replayer, job.examples, steerings, job.scope)
    totals = job.loop.run(job.examples, under, "verify")
    measured = Measured(job.examples, answered(totals), job.seed)
    return {
        "format": "hones-eval verification",
        "package_version": __version__,
        "ranking": {"method": job.ranking.provenance.method, "digest": job.ranking.digest},
        "examples": asdict(held_out),
        "metric": job.examples.metric,
        "higher_is_better": job.examples.higher_is_better,
        "sites": kind_of_sites(job),
        "scope": job.scope,
        "seed": job.seed,
        "correction": job.correction,
        "bank_sizes": {name: len(bank) for name, bank in banks.items()},
        "warnings": [
            *(f"no {name} head has a score above 0, so none was masked" for name in banks if not banks[name]),
            *filter(None, [few, job.examples.constant_answer_warning(), measured.nothing_to_lose()]),
        ],
        **measured.report(job.correction),
    }


def kind_of_sites(job: Verification) -> Literal["neurons", "heads"]:
    """The kind of sites to mask; `auto` is heads for V-SEAM rankings and neurons for all others."""
    if job.sites != "auto":
        return job.sites
    heads_alone = job.ranking.head_positive is not None or job.ranking.neuron_scores is None
    return "heads" if heads_alone else "neurons"


def choose_banks(job: Verification) -> Mapping[str, Sequence[Head] | Sequence[Neuron]]:
    """The selected banks and the random banks, by name."""
    if kind_of_sites(job) == "heads":
        return head_banks(job.ranking, job.heads, job.trials, job.seed)
    return neuron_banks(job.ranking, job.neurons, job.trials, job.seed)


def masked(ranking: Ranking, bank: Sequence[Head | Neuron]) -> Steering:
    """A steering that sets every site of a bank to zero."""
    heads = [site for site in bank if isinstance(site, Head)]
    neurons = [site for site in bank if isinstance(site, Neuron)]
    settings = {"how": "masked", "count": len(bank)}
    if heads:
        return scaling.scaled_heads(ranking, heads, 0.0, settings)
    return scaling.scaled_neurons(ranking, neurons, 0.0, settings)


def refuse_shared_images(source: Provenance, held_out: ExampleSet, purpose: str) -> None:
    """Raise HonesError, with the count, for examples with images or questions that `source` was made from.

    Questions are compared only where they show no image.
    """
    for chosen in source.examples:
        shared = chosen.shared_images(held_out)
        if shared:
            raise HonesError(
                f"{len(shared)} of the {len(held_out.image_hashes)} images of {held_out.task} "
                f"({held_out.split}) were also used to make the ranking ({chosen.task}, {chosen.split}): "
                f"{purpose} needs other images; choose another split, or set --offset and --limit"
            )
        texts = chosen.shared_texts(held_out)
        if texts:
            raise HonesError(
                f"{len(texts)} of the {held_out.count} questions of {held_out.task} ({held_out.split}) were "
                f"also used to make the ranking ({chosen.task}, {chosen.split}): {purpose} needs other "
                "questions; choose another split, or set --offset and --limit"
            )


def as_drop(judged: Judged) -> dict[str, Any]:
    """A judged gain as a drop, for JSON: the value and interval change their sign, the verdict does not."""
    found = judged.to_json()
    gain, low, high = (found.pop(name) for name in ("gain", "low", "high"))
    ends = {"low": None, "high": None} if low is None else {"low": -high, "high": -low}
    return {"value": -gain if gain else 0.0, **ends, **found}


class Measured:
    """Values and drops of masked banks from one pass of answers, with paired intervals over images."""

    def __init__(self, examples: TaskExamples, records: Sequence[Answered], seed: int) -> None:
        """Resample the metric, the answer's probability and the accuracy, all conditions together."""
        self.names = list(records[0].answers)
        self.sign = 1.0 if examples.higher_is_better else -1.0
        self.seed, self.aggregate = seed, examples.aggregate
        self.clusters = by_images([record.image_hashes for record in records])
        self.results = [[record.answers[name].result for record in records] for name in self.names]
        self.by_example = example_values(examples.metric, examples.aggregate, self.results)
        metric = resample_results(examples.metric, examples.aggregate, self.results, self.clusters, seed=seed)
        first = {
            what: np.array([[float(getattr(r.answers[n], what)) for n in self.names] for r in records])
            for what in ("probability", "correct")
        }
        self.first = {"probability": first["probability"], "accuracy": first["correct"]}
        resampled = {
            what: resample_means(values, self.clusters, seed=seed) for what, values in self.first.items()
        }
        self.values = {"metric": metric, **resampled}

    def report(self, correction: Correction = "holm") -> dict[str, Any]:
        """The unmasked values, every bank's drops, the random banks' mean, and the drops beyond that mean."""
        chosen = [name for name in self.names[1:] if not name.startswith("random")]
        banks = {name: self.drops(name) for name in self.names[1:]}
        rows = [(name, what) for what in self.values for name in chosen]
        contrasts = [contrast for what in self.values for contrast in self.contrasts(chosen, what)]
        for (name, what), judged in zip(rows, judge(contrasts, correction), strict=True):
            banks[name][f"{what}_drop"] = as_drop(judged)
        return {
            BASELINE: {what: float(values.observed[0]) for what, values in self.values.items()},
            "banks": banks,
            "random": {what: self._spread(what) for what in self.values},
            "beyond_random": {name: self._beyond(name) for name in chosen},
        }

    def value(self, name: str) -> float:
        """The metric under one condition."""
        return float(self.values["metric"].observed[self.names.index(name)])

    def contrasts(self, names: Sequence[str], what: str = "metric") -> list[Contrast]:
        """Compare conditions with the baseline, positive where they are better.

        Args:
            names: the conditions. A name that was not measured changes nothing: it is the baseline.
            what: `metric`, or of the answer's first token its `probability` or `accuracy`.
        """
        places = [self.names.index(name) if name in self.names else 0 for name in names]
        sign = self.sign if what == "metric" else 1.0
        values, scale = (self.first[what], 1.0) if what != "metric" else (self.by_example or (None, 1.0))
        if values is not None:
            conditions = values[:, places]
            settings = {"sign": sign, "scale": scale}
            return contrasts_of_values(values[:, 0], conditions, self.clusters, seed=self.seed, **settings)  # type: ignore[arg-type]
        return [
            contrast_of_corpus(
                self.aggregate, self.results[0], self.results[place], self.clusters, sign=sign, seed=self.seed
            )
            for place in places
        ]

    def pooled(self, names: Sequence[str], what: str = "metric") -> Contrast:
        """Compare the mean over several conditions with the baseline: one thing that was drawn several times.

        Each example counts once, with its mean over the conditions. Testing every draw by itself would find
        some of them better or worse by chance, and would not use that they agree.

        Args:
            names: the conditions, such as random banks of several seeds.
            what: as in `contrasts`.
        """
        places = [self.names.index(name) if name in self.names else 0 for name in names]
        sign = self.sign if what == "metric" else 1.0
        values, scale = (self.first[what], 1.0) if what != "metric" else (self.by_example or (None, 1.0))
        if values is not None:
            mean = values[:, places].mean(1, keepdims=True)
            return contrasts_of_values(
                values[:, 0], mean, self.clusters, sign=sign, scale=scale, seed=self.seed
            )[0]

        def mean_metric(drawn: Sequence[tuple[Any, ...]]) -> float:
            return float(np.mean([self.aggregate(list(column)) for column in zip(*drawn, strict=True)]))

        baseline = [(result,) * len(places) for result in self.results[0]]
        conditions = list(zip(*(self.results[place] for place in places), strict=True))
        return contrast_of_corpus(mean_metric, baseline, conditions, self.clusters, sign=sign, seed=self.seed)

    def nothing_to_lose(self) -> str | None:
        """A warning when the unmasked model scores 0; None otherwise."""
        if self.sign < 0 or float(self.values["metric"].observed[0]) != 0:
            return None
        return "the unmasked model already scores 0, so a zero drop is uninformative"

    def drops(self, name: str) -> dict[str, Any]:
        """One bank's values, and its absolute and relative drops. A positive drop is always a loss."""
        place = self.names.index(name)
        found: dict[str, Any] = {}
        for what, values in self.values.items():
            found[what] = float(values.observed[place])
            found[f"{what}_drop"] = values.estimate(self._drop(what, place)).to_json()
        base = self.values["metric"]
        drop = self._drop("metric", place)
        found["relative_drop"] = base.estimate(lambda v: drop(v) / np.abs(v[..., 0])).to_json()
        return found

    def _drop(self, what: str, place: int) -> Callable[[Floats], Floats]:
        sign = self.sign if what == "metric" else 1.0
        return lambda values: sign * (values[..., 0] - values[..., place])

    def _random(self) -> list[int]:
        return [k for k, name in enumerate(self.names) if name.startswith("random")]

    def _spread(self, what: str) -> dict[str, Any]:
        drops = [float(self._drop(what, k)(self.values[what].observed)) for k in self._random()]
        spread = float(np.std(drops, ddof=1))
        found = {"drop_mean": float(np.mean(drops)), "drop_sd": spread, "drop_largest": max(drops)}
        contrast = self.pooled([self.names[k] for k in self._random()], what)
        return found | {"pooled": as_drop(judge([contrast])[0])}

    def _beyond(self, name: str) -> dict[str, Any]:
        """The difference between a bank's drop and the mean drop of the random banks."""
        place, random = self.names.index(name), self._random()

        def contrast(what: str) -> Callable[[Floats], Floats]:
            drop = self._drop(what, place)
            others = [self._drop(what, k) for k in random]
            return lambda values: drop(values) - np.mean([other(values) for other in others], axis=0)

        return {what: values.estimate(contrast(what)).to_json() for what, values in self.values.items()}
