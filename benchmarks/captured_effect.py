"""The captured effect of rankings of neurons: the share of the largest possible single-neuron effect.

    python benchmarks/captured_effect.py --examples 32 --seeds 3 --out captured.json

ranks the neurons of the bundled model on fresh discovery examples, which the ground truth did not use, and
compares the best 1 % with the ground truth of 200 images (`hones_eval/toy/ground_truth`). Each seed takes its
own examples. Tasks whose truth has no split halves are left out. Times are CPU seconds.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from hones_eval import api
from hones_eval.core.artifact import write_json
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import load_ground_truth
from hones_eval.toy.yardstick import agreement, captured_effect

ROWS: dict[str, dict[str, Any]] = {
    "hones": {"method": "hones"},
    "dvp": {"method": "dvp"},
    "activation": {"method": "activation"},
    "random": {"method": "random"},
    "atp, margin, position": {"method": "atp"},
    "atp, margin, example": {"method": "atp", "absolute": "example"},
    "atp, log_probability, example": {
        "method": "atp",
        "objective": "log_probability",
        "absolute": "example",
    },
    "atp, log_probability, position": {"method": "atp", "objective": "log_probability"},
    "atp, confirm 200": {"method": "atp", "confirm": 200},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=32, help="per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("captured.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    truth = load_ground_truth()
    model = api.load("llava_hf", f"pretrained={checkpoint_path()}")
    found = []
    for task, about in truth.report["tasks"].items():
        effects = truth.effects[task]["neurons"]
        if not effects.halves:
            continue
        for seed in range(given.seeds):
            for row in given.rows:
                started = time.process_time()
                ranking = api.rank(
                    model,
                    f"scenes_{task}_discovery",
                    limit=given.examples,
                    offset=about["examples"] + seed * given.examples,
                    heads=8,
                    seed=seed,
                    **ROWS[row],
                )
                seconds = time.process_time() - started
                scores, k = ranking.neuron_scores, len(ranking.neurons())
                assert scores is not None
                if ranking.neuron_examples is not None:  # what was not measured is not selected
                    scores = scores.masked_fill(ranking.neuron_examples == 0, float(scores.min()) - 1)
                captured = captured_effect(
                    scores, effects.log_probability, k, effects.halves["log_probability"]
                )
                precision = agreement(scores, effects.log_probability, k).precision
                found.append(
                    {
                        "task": task,
                        "seed": seed,
                        "row": row,
                        "captured": captured.share,
                        "ceiling": captured.ceiling,
                        "precision": precision,
                        "seconds": seconds,
                    }
                )
                print(
                    f"{task:14} seed {seed} {row:32} captured {captured.share:.2f} (ceiling "
                    f"{captured.ceiling:.2f}) precision {precision:.2f} {seconds:.1f} s",
                    flush=True,
                )
                write_json(given.out, {"examples": given.examples, "rows": found})


if __name__ == "__main__":
    main()
