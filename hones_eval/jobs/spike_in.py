"""Spike-in: plant a fault in the model and report how much of it the pipeline repairs (a positive control).

A steering that does not help can mean that the model has nothing to gain, that the test has no power, or that
the pipeline does not work. A spike-in separates these. It damps a bank of heads or neurons, which costs a
known part of the metric, then ranks and scales on the damaged model as a user would, and reports on test
images

    recovered = (steered - damaged) / (undamaged - damaged)

with a paired interval, compared with the exact repair of the planted sites and with random sites.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from hones_eval.choices import Correction, HowHeads, HowNeurons, Plant, Way, check_damage
from hones_eval.core.attach import AttachMode, steer
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, matched_random, top_heads, top_neurons
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.jobs.scale import Development, choose
from hones_eval.jobs.tune import TuneSettings
from hones_eval.jobs.verify import Measured, refuse_shared_images
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.answers import BASELINE, AnswersUnder, answered
from hones_eval.methods.banks import check_fits
from hones_eval.methods.registry import MethodName as Method
from hones_eval.runs.lightning import Loop
from hones_eval.stats.paired import Floats
from hones_eval.stats.verdicts import Judged, judge
from hones_eval.version import __version__

UNDAMAGED, REPAIR = "undamaged", "exact repair"
ON_HEADS = ("fixed", "learned", "learned_no_kl", "tuned", "halving")
"""Ways that can also scale a given bank of heads; the others can only scale a bank of neurons."""
ON_NEURONS = (*ON_HEADS, "grid", "search")


@dataclass(frozen=True, eq=False)
class SpikeIn:
    """The input of `spike_in`.

    Attributes:
        ranking: of the undamaged model; the planted sites are chosen from it.
        replayer: the undamaged model.
        loop: the processes to run on.
        discovery: examples to rank on.
        development: examples to choose scales on.
        test: examples to report on. The three sets must share no image.
        plant: which sites to damp: the ranking's best neurons, its best heads, or random neurons.
        neurons: the share of all neurons that is planted, and that a ranking selects for the ways that
            scale a selection; `tuned` may scale all heads and neurons.
        heads: the number of heads that is planted, and that a ranking selects.
        damp: the scale of the planted sites, above 0 and below 1.
        method: how the damaged model is ranked.
        ways: how scales are chosen on the damaged model.
        factor: of the way `fixed`.
        trials: random controls per way: the same scales on random other sites of the same layers.
        chosen_on_random: also choose scales on a random bank, layer-matched to the planted one.
        attach: how the damage is attached.
        tune: the settings of the way `tuned`.
        seed: of everything that is drawn at random.
        correction: of the p-values of the ways and the exact repair.
        scope: the tokens at which sites are damped, ranked and scaled, as in `steer`.
    """

    ranking: Ranking
    replayer: Replayer
    loop: Loop
    discovery: TaskExamples
    development: TaskExamples
    test: TaskExamples
    plant: Plant = "neurons"
    neurons: float = 0.01
    heads: int = 4
    damp: float = 0.25
    method: Method = "hones"
    ways: Sequence[Way] = ("tuned",)
    factor: float = 2.0
    trials: int = 5
    chosen_on_random: bool = True
    attach: AttachMode = "hook"
    tune: TuneSettings = field(default_factory=TuneSettings)
    seed: int = 0
    correction: Correction = "holm"
    scope: str = "all"

    def __post_init__(self) -> None:
        """Reject a fault that cannot be repaired, a ranking of another model, and sets that share images."""
        check_damage(self.damp, self.trials)
        anatomy = self.replayer.anatomy
        check_fits(self.ranking, anatomy.shape, type(anatomy.model).__name__)
        chosen_on = (self.discovery, self.development)
        for purpose, part, used in (
            ("choosing scales", self.development, chosen_on[:1]),
            ("testing", self.test, chosen_on),
        ):
            for source in used:
                made = provenance(anatomy, source, self.method, {}, self.seed)
                refuse_shared_images(made, part.example_set(), purpose)
        refuse_shared_images(self.ranking.provenance, self.test.example_set(), "testing")

    @property
    def planted(self) -> list[Head] | list[Neuron]:
        """The sites that are damped."""
        if self.plant == "heads":
            if self.ranking.head_scores is None:
                raise HonesError("this ranking has no head scores: plant neurons, or rank with heads")
            return self.ranking.heads(self.heads)
        bank = self.ranking.neurons(self.neurons)
        if self.plant == "random":
            return matched_random(bank, self.ranking.provenance.shape, self.seed)
        return bank


def spike_in(job: SpikeIn) -> dict[str, Any]:
    """Damage the model, rank and scale on it, and measure how much of the loss is recovered.

    Returns: a JSON-ready report, the same on every process. The model is given back undamaged.
    """
    planted = job.planted
    job = replace(job, replayer=job.replayer.in_scope(job.scope))
    damage = _scaled(job.ranking, planted, job.damp)
    before = answered(job.loop.run(job.test, AnswersUnder(job.replayer, job.test, {}), "undamaged"))
    with steer(job.replayer.anatomy.model, damage, job.attach, scope=job.scope):
        # Replay was proven exact on the undamaged model; hooks may change that.
        job = replace(job, replayer=job.replayer.unproven())
        ranking = _rank(job)
        steerings, chosen = _steerings(job, ranking, planted)
        conditions = {name: steering for name, steering in steerings.items() if not steering.is_noop}
        after = job.loop.run(job.test, AnswersUnder(job.replayer, job.test, conditions), "damaged")
    records = [
        found._replace(answers=found.answers | {UNDAMAGED: undamaged.answers[BASELINE]})
        for found, undamaged in zip(answered(after), before, strict=True)
    ]
    measured = Measured(job.test, records, job.seed)
    rows, controls = _rows(job, measured, steerings)
    damaged = judge(measured.contrasts([UNDAMAGED]))[0]
    return {
        "format": "hones-eval spike-in",
        "package_version": __version__,
        "plant": job.plant,
        "damp": job.damp,
        "planted": [list(site) for site in planted],
        "metric": job.test.metric,
        "undamaged": measured.value(UNDAMAGED),
        "damaged": measured.value(BASELINE),
        "loss": damaged.to_json(),
        "repairable": damaged.verdict == "better",
        "rows": rows,
        "controls": controls,
        "controls_called_better": sum(row["verdict"] == "better" for row in controls),
        "controls_pooled": _pooled(job, measured),
        "planted_in_rankings": {
            "undamaged": standing(job.ranking, planted),
            "damaged": standing(ranking, planted),
        },
        "chosen": chosen,
        "examples": {
            "discovery": asdict(job.discovery.example_set()),
            "development": asdict(job.development.example_set()),
            "test": asdict(job.test.example_set()),
        },
        "settings": {
            "method": job.method,
            "ways": list(job.ways),
            "neurons": job.neurons,
            "heads": job.heads,
            "trials": job.trials,
            "seed": job.seed,
            "attach": job.attach,
            "correction": job.correction,
            "scope": job.scope,
        },
        "ranking": {"method": job.ranking.provenance.method, "digest": job.ranking.digest},
    }


def standing(ranking: Ranking, planted: Sequence[Head | Neuron]) -> dict[str, Any] | None:
    """Where the planted sites are in a ranking: how many of the top as many, and their median rank."""
    heads = isinstance(planted[0], Head)
    scores = ranking.head_scores if heads else ranking.neuron_scores
    if scores is None:
        return None
    shape = ranking.provenance.shape
    measured = shape.head_mask() if heads else ranking.measured_neurons()
    scores = scores.masked_fill(~measured, -torch.inf)  # last, and so never found
    top = top_heads(scores, scores.numel()) if heads else top_neurons(scores, scores.numel())
    ranks = {site: rank for rank, site in enumerate(top, start=1)}
    own = sorted(ranks[site] for site in planted)
    return {
        "found": sum(rank <= len(planted) for rank in own),
        "of": len(planted),
        "median_rank": own[len(own) // 2],
        "sites": int((shape.head_mask() if heads else shape.neuron_mask()).sum()),
    }


def shuffled(steering: Steering, seed: int, planted: Sequence[Head | Neuron] = ()) -> Steering:
    """The same scales on random sites of the same layers, and 1 on the planted sites.

    In a mixture of experts the scales of each expert's neurons stay within it, where they act equally often.
    A layer or expert has fewer sites left than scales where some of its sites were planted: the scales
    nearest to 1 are left out. Planted sites are no control, since scaling one of them repairs a part of the
    damage.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffle(scales: Tensor, groups: Callable[[int], list[range]], taken: set[Any]) -> Tensor:
        found = torch.ones_like(scales)
        for layer, row in enumerate(scales):
            for members in groups(layer):
                own = row[members.start : members.stop]
                free = [site for site in members if (layer, site) not in taken]
                order = (own - 1).abs().argsort(descending=True, stable=True)
                drawn = torch.randperm(len(free), generator=generator)
                found[layer, torch.tensor(free, dtype=torch.long)[drawn]] = own[order[: len(free)]]
        return found

    shape = steering.provenance.shape
    heads = {tuple(site) for site in planted if isinstance(site, Head)}
    neurons = {tuple(site) for site in planted if isinstance(site, Neuron)}
    return replace(
        steering,
        head_scales=shuffle(steering.head_scales, lambda layer: [range(shape.heads_of(layer))], heads),
        neuron_scales=shuffle(steering.neuron_scales, shape.routed_alike, neurons),
    )


def _scaled(ranking: Ranking, bank: Sequence[Head | Neuron], factor: float) -> Steering:
    heads = [site for site in bank if isinstance(site, Head)]
    neurons = [site for site in bank if isinstance(site, Neuron)]
    settings = {"how": "spike-in", "factor": factor, "count": len(bank)}
    if heads:
        return scaling.scaled_heads(ranking, heads, factor, settings)
    return scaling.scaled_neurons(ranking, neurons, factor, settings)


def _rank(job: SpikeIn) -> Ranking:
    """Rank the damaged model."""
    settings = {"metric": job.discovery.metric, "heads": job.heads, "neurons": job.neurons}
    source = provenance(job.replayer.anatomy, job.discovery, job.method, settings, job.seed)
    return discover(Discovery(job.replayer, job.discovery, job.loop, source, job.heads, job.neurons))


def _steerings(
    job: SpikeIn, ranking: Ranking, planted: Sequence[Head | Neuron]
) -> tuple[dict[str, Steering], dict[str, Any]]:
    """The exact repair, the steerings that the pipeline chooses, and their random controls.

    Returns: the steerings by name, and the settings with which each way chose its scales.
    """
    found = {REPAIR: _scaled(ranking, planted, 1 / job.damp)}
    chosen: dict[str, Any] = {}
    for way in job.ways:
        found[way] = _chosen(job, ranking, way)
        chosen[way] = found[way].provenance.settings
        if job.chosen_on_random and way in (ON_HEADS if job.plant == "heads" else ON_NEURONS):
            bank = _random_like(job, planted)
            found[f"{way}, on a random bank"] = _chosen(job, ranking, way, bank)
    names: list[str] = [REPAIR, *job.ways]
    for name in names:
        for trial, control in enumerate(_controls_of(job, name)):
            found[control] = shuffled(found[name], job.seed + trial, planted)
    return found, chosen


def _random_like(job: SpikeIn, planted: Sequence[Head | Neuron]) -> list[Head] | list[Neuron]:
    """A random bank with as many sites in each layer as the planted one, which it leaves out."""
    shape, like = job.ranking.provenance.shape, [Neuron(*site) for site in planted]
    if job.plant != "heads":
        return matched_random(like, shape, job.seed + 1)
    widths = [shape.heads_of(layer) for layer in range(shape.layers)]
    return [Head(*site) for site in matched_random(like, widths, job.seed + 1)]


def _chosen(
    job: SpikeIn, ranking: Ranking, way: Way, bank: Sequence[Head | Neuron] | None = None
) -> Steering:
    if way == "fixed":
        sites = ranking.neurons(job.neurons) if bank is None else bank
        return _scaled(ranking, sites, job.factor)
    development = Development(
        ranking,
        job.replayer,
        job.development,
        job.loop,
        # `tuned` chooses among all neurons, as it does by default in `hones-eval scale`.
        None if way == "tuned" else job.neurons,
        heads=job.heads,
        tune=job.tune,
        sites=bank,
    )
    return choose(development, cast(HowNeurons | HowHeads, way))


def _rows(
    job: SpikeIn, measured: Measured, steerings: Mapping[str, Steering]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the ways, corrected together, and those of the random controls, each judged alone.

    A control that is judged alone has the larger chance of a false verdict: the count of controls that are
    called better is then an upper bound of what a corrected report would show.
    """
    names = [name for name in steerings if not name.startswith("random")]
    judged = dict(zip(names, judge(measured.contrasts(names), job.correction), strict=True))
    rows = [_row(measured, name, judged[name], steerings[name]) for name in names]
    random = [name for name in steerings if name.startswith("random")]
    alone = [judge([contrast])[0] for contrast in measured.contrasts(random)]
    return rows, [
        _row(measured, name, verdict, steerings[name]) for name, verdict in zip(random, alone, strict=True)
    ]


def _pooled(job: SpikeIn, measured: Measured) -> list[dict[str, Any]]:
    """The random controls of each way as one row: the mean over their seeds, judged alone."""
    return [
        {"scales": name} | judge([measured.pooled(_controls_of(job, name))])[0].to_json()
        for name in (REPAIR, *job.ways)
    ]


def _controls_of(job: SpikeIn, name: str) -> list[str]:
    return [f"random {trial + 1}: {name}" for trial in range(job.trials)]


def _row(measured: Measured, name: str, verdict: Judged, steering: Steering) -> dict[str, Any]:
    changes = steering.distances
    place = 0 if steering.is_noop else measured.names.index(name)
    share = measured.values["metric"].estimate(_recovered(place, measured.names.index(UNDAMAGED)))
    return {
        "scales": name,
        "value": measured.value(BASELINE if steering.is_noop else name),
        **verdict.to_json(),
        "recovered": share.to_json(),
        "scaled_sites": int((changes > 0).sum()),
        "largest_change": float(changes.max()),
    }


def _recovered(place: int, undamaged: int) -> Callable[[Floats], Floats]:
    return lambda values: (values[..., place] - values[..., 0]) / (values[..., undamaged] - values[..., 0])
