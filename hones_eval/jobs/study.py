"""The whole experiment on several tasks: which neurons matter by which method, and whether scaling helps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from hones_eval.choices import Correction, HowNeurons
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.learn import FitSettings
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.jobs.scale import Development, choose, learned_settings
from hones_eval.jobs.verify import Measured, as_drop, masked, refuse_shared_images
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.answers import BASELINE, AnswersUnder, answered
from hones_eval.methods.banks import few_trials, neuron_banks
from hones_eval.methods.registry import MethodName as Method
from hones_eval.runs.lightning import Loop
from hones_eval.stats.verdicts import Contrast, Judged, judge

WAYS = ("fixed", "grid", "search", "learned", "learned_no_kl", "random")


class TaskSplits(NamedTuple):
    """One task's three image-disjoint example sets, and its shifted test set if there is one."""

    name: str
    discovery: TaskExamples
    development: TaskExamples
    test: TaskExamples
    shifted: TaskExamples | None


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """The input of `run`: tasks, methods and settings, and the folder that keeps rankings and steerings.

    A second run with the same folder reuses the rankings and steerings that it finds there.
    """

    replayer: Replayer
    loop: Loop
    tasks: Sequence[TaskSplits]
    methods: Sequence[Method]
    out: Path
    settings: dict[str, Any]
    heads: int = 30
    neurons: float = 0.01
    factor: float = 2.0
    trials: int = 5
    seed: int = 0
    fit: FitSettings = dataclasses.field(default_factory=FitSettings)
    correction: Correction = "holm"

    def __post_init__(self) -> None:
        """Reject a study without HONES or with too few random banks, and test sets that show an image of any
        discovery or development set.
        """
        few_trials(self.trials)
        if "hones" not in self.methods:
            raise HonesError("--methods must include hones, whose neurons are scaled")
        chosen_on = [part for task in self.tasks for part in (task.discovery, task.development)]
        for task in self.tasks:
            for held_out in (task.test, task.shifted):
                for part in chosen_on if held_out is not None else ():
                    source = provenance(self.replayer.anatomy, part, "hones", {}, self.seed)
                    refuse_shared_images(source, held_out.example_set(), "testing")  # type: ignore[union-attr]


def run(study: Study) -> dict[str, Any]:
    """Rank, scale and test.

    Returns: a JSON-ready report, the same on every process.
    """
    rankings: dict[str, dict[str, Ranking]] = {
        task.name: {method: _ranked(study, task, method) for method in study.methods} for task in study.tasks
    }
    steerings = {
        task.name: {how: _scaled(study, task, rankings[task.name]["hones"], how) for how in WAYS}
        for task in study.tasks
    }
    attribution: list[_Pending] = []
    steering: list[_Pending] = []
    for task in study.tasks:
        masks = _masks(study, rankings[task.name])
        everything = {
            f"{source}|{how}": scaled for source, ways in steerings.items() for how, scaled in ways.items()
        }
        measured = _measured(study, task.test, {**masks, **everything})
        attribution += _attribution_rows(study, task, rankings[task.name], measured)
        steering += _steering_rows(task, "test", measured, everything)
        if task.shifted is not None:
            own = {name: scaled for name, scaled in everything.items() if name.startswith(f"{task.name}|")}
            steering += _steering_rows(task, "shifted", _measured(study, task.shifted, own), own)
    sizes = {
        task.name: {"test": len(task.test), "development": len(task.development)} for task in study.tasks
    }
    notes = [
        *filter(None, [few_trials(study.trials)]),
        *fallbacks({task.name: rankings[task.name]["hones"] for task in study.tasks}),
        *_unmeasured({task.name: rankings[task.name]["hones"] for task in study.tasks}),
    ]
    return {
        "attribution": _judged(attribution, "drop", as_drop, study.correction),
        "steering": _judged(steering, "gain", Judged.to_json, study.correction),
        "correction": study.correction,
        "examples": sizes,
        "notes": notes,
    }


class _Pending(NamedTuple):
    """A row of a table before its verdict, and what the verdict depends on; None where there is none."""

    row: dict[str, Any]
    contrast: Contrast | None


def _judged(
    pending: Sequence[_Pending],
    name: str,
    as_json: Callable[[Judged], dict[str, Any]],
    correction: Correction,
) -> list[dict[str, Any]]:
    """The rows of a table with their intervals and verdicts, corrected over the whole table."""
    verdicts = iter(judge([one.contrast for one in pending if one.contrast is not None], correction))
    rows = []
    for row, contrast in pending:
        if contrast is not None:
            found = as_json(next(verdicts))
            row |= {f"{name}_low": found["low"], f"{name}_high": found["high"]}
            row |= {key: found.get(key) for key in ("p", "p_adjusted", "verdict", "detectable", "units")}
        rows.append(row)
    return rows


def fallbacks(rankings: Mapping[str, Ranking]) -> list[str]:
    """Notes on tasks for which HONES found no head with a positive score."""
    without = [
        name for name, ranking in rankings.items() if not (ranking.report or {})["heads_with_positive_score"]
    ]
    return [
        f"{name}: replacing a head never lowers the metric, so neurons are ranked by contribution alone"
        for name in without
    ]


def _unmeasured(rankings: Mapping[str, Ranking]) -> list[str]:
    """Notes on neurons of experts that no discovery example was routed to."""
    reports = {name: ranking.report or {} for name, ranking in rankings.items()}
    return [
        f"{name}: {report['neurons_not_measured']} neurons of {report['experts_never_routed_to']} of the "
        f"{report['experts']} experts were not measured, because no discovery example was routed to them"
        for name, report in reports.items()
        if report.get("neurons_not_measured")
    ]


def _ranked(study: Study, task: TaskSplits, method: Method) -> Ranking:
    folder = study.out / "rankings" / task.name / method
    settings = study.settings | {"metric": task.discovery.metric}
    source = provenance(study.replayer.anatomy, task.discovery, method, settings, study.seed)
    if (folder / "ranking.json").exists():
        known = Ranking.load(folder)
        made, wanted = known.provenance, source
        if made.weights is not None:  # rankings of older versions do not record them
            _same(folder, made.weights, wanted.weights, "another model")
        _same(folder, [made.examples[0].hash, made.seed], [wanted.examples[0].hash, wanted.seed])
        _same(folder, made.settings, wanted.settings)
        return known
    others = [other.discovery for other in study.tasks if other is not task] if method == "entropy" else []
    ranking = discover(
        Discovery(study.replayer, task.discovery, study.loop, source, study.heads, study.neurons, others)
    )
    if study.loop.is_first:
        ranking.save(folder)
    return ranking


def _scaled(study: Study, task: TaskSplits, ranking: Ranking, how: str) -> Steering:
    folder = study.out / "steerings" / task.name / how
    if (folder / "steering.json").exists():
        known = Steering.load(folder)
        _same(folder, (known.provenance.ranking or {}).get("digest"), ranking.digest)
        wanted = _settings(study, ranking, how)
        _same(folder, {name: known.provenance.settings.get(name) for name in wanted}, wanted)
        if how != "fixed":
            _same(folder, known.provenance.examples[-1].hash, task.development.example_set().hash)
        return known
    if how == "fixed":
        steering = scaling.fixed(ranking, study.factor, study.neurons)
    else:
        job = Development(
            ranking,
            study.replayer,
            task.development,
            study.loop,
            study.neurons,
            settings=study.fit,
        )
        steering = choose(job, cast(HowNeurons, how))
    if study.loop.is_first:
        steering.save(folder)
    return steering


def _settings(study: Study, ranking: Ranking, how: str) -> dict[str, Any]:
    """The settings that a steering of this study records."""
    wanted: dict[str, Any] = {"how": how, "count": len(ranking.neurons(study.neurons))}
    if how == "fixed":
        return wanted | {"factor": study.factor}
    if how in ("grid", "search"):
        return wanted
    return wanted | learned_settings(study.fit, cast(HowNeurons, how)).recorded()


def _same(folder: Path, found: object, wanted: object, differing: str = "other examples or settings") -> None:
    if found != wanted:
        raise HonesError(f"{folder} was made with {differing}: give another --out, or delete it")


def _masks(study: Study, rankings: dict[str, Ranking]) -> dict[str, Steering]:
    """Steerings that mask every method's bank, and random banks matched to that of HONES."""
    hones = rankings["hones"]
    banks: dict[str, list[Neuron]] = {
        f"mask {name}": ranking.neurons(study.neurons) for name, ranking in rankings.items()
    }
    drawn = neuron_banks(hones, study.neurons, study.trials, study.seed)
    banks |= {name: bank for name, bank in drawn.items() if name != "selected"}
    return {name: masked(hones, bank) for name, bank in banks.items()}


def _measured(study: Study, examples: TaskExamples, steerings: dict[str, Steering]) -> Measured:
    totals = study.loop.run(examples, AnswersUnder(study.replayer, examples, steerings), examples.task)
    return Measured(examples, answered(totals), study.seed)


def _attribution_rows(
    study: Study, task: TaskSplits, rankings: dict[str, Ranking], measured: Measured
) -> list[_Pending]:
    base = measured.value(BASELINE)
    banks = {name: set(ranking.neurons(study.neurons)) for name, ranking in rankings.items()}
    random = [name for name in measured.names if name.startswith("random")]
    last = study.replayer.anatomy.shape.layers - 1
    rows = [
        {
            "task": task.name,
            "method": name,
            "metric": task.test.metric,
            "baseline": base,
            **_flat("drop", measured.drops(f"mask {name}")["metric_drop"]),
            "neurons": len(bank),
            "in_last_layer": sum(neuron.layer == last for neuron in bank),
            "shared_with_hones": len(bank & banks["hones"]),
        }
        for name, bank in banks.items()
    ]
    values = [measured.drops(name)["metric_drop"]["value"] for name in random]
    matched = {"drop": float(np.mean(values)), "drop_low": min(values), "drop_high": max(values)}
    like = f"random, layers as hones ({len(values)} banks: mean, least, most)"
    contrasts = measured.contrasts([f"mask {name}" for name in banks])
    alone = judge([measured.pooled(random)])[0]
    verdict = {"p": alone.p, "p_adjusted": alone.p, "verdict": alone.verdict}
    verdict |= {"detectable": alone.detectable, "units": alone.units}
    pooled = {**rows[0], **matched, "method": like, "shared_with_hones": 0, **verdict}
    return [*map(_Pending, rows, contrasts), _Pending(pooled, None)]


def _steering_rows(
    task: TaskSplits, where: str, measured: Measured, steerings: dict[str, Steering]
) -> list[_Pending]:
    metric = measured.values["metric"]
    examples = task.test if where == "test" else task.shifted
    rows = []
    for name, steering in steerings.items():
        source, how = name.split("|")
        place = measured.names.index(name)
        gain = metric.estimate(_gain(measured.sign, place))
        rows.append(
            {
                "chosen_for": source,
                "how": how,
                "measured_on": task.name,
                "split": where,
                "tested_on": examples.task if examples else "",
                "metric": examples.metric if examples else "",
                BASELINE: float(metric.observed[0]),
                "steered": float(metric.observed[place]),
                **_flat("gain", gain.to_json()),
                "largest_change_of_a_scale": float((steering.neuron_scales - 1).abs().max()),
            }
        )
    return list(map(_Pending, rows, measured.contrasts(list(steerings))))


def _gain(sign: float, place: int) -> Callable[[Any], Any]:
    return lambda values: sign * (values[..., place] - values[..., 0])


def _flat(name: str, estimate: dict[str, Any]) -> dict[str, Any]:
    return {name: estimate["value"], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
