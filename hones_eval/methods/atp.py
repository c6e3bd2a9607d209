"""Attribution patching: rank heads and neurons by a first-order estimate of the effect of removing each."""

from dataclasses import asdict
from typing import Any

from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import top_heads
from hones_eval.engine.decoding import Decoder
from hones_eval.methods.attribution import Attribution
from hones_eval.methods.discovery import Discovery
from hones_eval.methods.routing import unmeasured_report


def rank(job: Discovery) -> Ranking:
    """Run one pass with gradients of activations, and rank heads and neurons by mean absolute estimates.

    The signed means are stored as `head_direction` and `neuron_direction`: positive where removing the site
    lowers the objective, to first order.
    """
    job.check_counts()
    shape = job.provenance.shape
    attribution = Attribution(
        job.replayer.anatomy,
        Decoder(job.replayer).append_answer,
        job.replacement,
        job.attribution,
        kinds=("heads", "neurons"),
        tracker=job.replayer.tracker,
    )
    totals = job.loop.run(job.examples, attribution, "attribution")
    head_scores = Attribution.scores(totals, "heads")
    report: dict[str, Any] = {
        "examples": int(totals.sums["examples"]),
        "metric": job.examples.metric,
        **asdict(job.attribution),
        "heads": [
            {"head": list(head), "score": float(head_scores[head])}
            for head in top_heads(head_scores, job.heads, shape.head_mask())
        ],
    }
    return Ranking(
        provenance=job.provenance,
        head_scores=head_scores,
        neuron_scores=Attribution.scores(totals, "neurons"),
        head_direction=Attribution.scores(totals, "heads", signed=True),
        neuron_direction=Attribution.scores(totals, "neurons", signed=True),
        neuron_examples=totals.sums.get("routed"),
        report=report | unmeasured_report(totals, shape),
    )
