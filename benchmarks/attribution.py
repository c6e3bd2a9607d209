"""The cost of `rank --method atp` and of `--confirm`, compared with plain passes and with HONES in one run.

    python benchmarks/attribution.py --examples 16 --confirm 500

Prints CPU seconds per example of one thread, for the same examples of the bundled model:

- one plain forward pass and one backward pass to the inputs of all decoder layers, by PyTorch alone;
- attribution patching of all heads and neurons, and its ratio to the plain passes;
- confirming the best sites, and its ratio to the arithmetic of its replays: for a site in layer `l` of `L`, a
  share `(L - l) / L` of one row of the language model's forward pass, timed on batches of as many rows as
  replay runs at once;
- HONES, heads and neurons.

The examples are loaded before the clock starts. Plain passes and attribution alternate, and the medians over
examples are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_loop import DTYPES, add_dtype
from torch import Tensor

from hones_eval import api
from hones_eval.engine.decoding import Decoder, repeat_example
from hones_eval.engine.passes import SiteEdit
from hones_eval.lmms.answers.kind import EditRun
from hones_eval.lmms.examples import Example
from hones_eval.methods.attribution import Attribution, AttributionSettings
from hones_eval.methods.confirm import SAMPLE, ExactEffects, _candidates, _edits
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.toy import checkpoint_path


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def plain_passes(model: api.Model, append: Callable[..., dict[str, Any]], example: Example) -> None:
    """A forward and a backward pass of the margin's first term, to the input of the first decoder layer."""
    inputs = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in append(example.inputs, example.settings, example.target_ids[:-1]).items()
    }
    kept: list[Tensor] = []

    def start(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        kept.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    layer = model.anatomy.layers[0]
    handle = layer.register_forward_pre_hook(start, with_kwargs=True)
    try:
        count = len(example.target_ids)
        logits = model.model(**inputs, use_cache=False).logits[0, -count:].float()
        value = logits.log_softmax(-1)[range(count), example.target_ids].sum()
        torch.autograd.grad(value, kept)
    finally:
        handle.remove()


@torch.no_grad()
def row_seconds(model: api.Model, example: Example, rows: int) -> float:
    """CPU seconds per row of a forward pass of all decoder layers, without images, on a batch of rows."""
    calls: list[tuple[Any, ...]] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((module, args, kwargs))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.anatomy.layers]
    try:
        model.model(**repeat_example(example.inputs, rows), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    def layers() -> None:
        for module, args, kwargs in calls:
            module(*args, **kwargs)

    return min(timed(layers) for _ in range(3)) / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", default="vqa_relation")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--confirm", type=int, default=500)
    add_dtype(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = api.load("llava_hf", f"pretrained={checkpoint_path()}")
    model.model.to(DTYPES[given.dtype])
    task = f"scenes_{given.task}_discovery"
    ranking = api.rank(model, task, method="atp", limit=given.examples)  # also warms up
    examples = model.examples(task, limit=given.examples)
    loaded = [examples[index] for index in range(len(examples))]
    append = Decoder(model.replayer).append_answer
    for weight in model.model.parameters():
        weight.requires_grad_(False)
    attribution = Attribution(
        model.anatomy, append, settings=AttributionSettings(), kinds=("heads", "neurons")
    )
    plain, estimated = [], []
    for example in loaded:
        with torch.enable_grad():
            plain.append(timed(lambda e=example: plain_passes(model, append, e)))  # type: ignore[misc]
        estimated.append(timed(lambda e=example: attribution.measure(e)))  # type: ignore[misc]
    shown = [("a plain forward and backward pass", statistics.median(plain), "")]
    middle = statistics.median(estimated)
    ratio = (
        f"{statistics.median(b / a for a, b in zip(plain, estimated, strict=True)):.2f} x the plain passes"
    )
    shown.append(("attribution patching, all heads and neurons", middle, ratio))
    shown.append(confirmed(model, ranking, loaded, given.confirm, examples))
    started = time.process_time()
    api.rank(model, task, method="hones", limit=given.examples)
    hones = (time.process_time() - started) / len(loaded)
    shown.append(("HONES, heads and neurons", hones, f"{hones / middle:.1f} x attribution patching"))
    for name, seconds, note in shown:
        print(f"{name:50s} {1000 * seconds:9.1f} ms per example  {note}")


def confirmed(
    model: api.Model, ranking: Any, loaded: list[Example], count: int, examples: Any
) -> tuple[str, float, str]:
    """The time per example of confirming sites, and its ratio to the arithmetic."""
    replacement = HeadReplacement.by_mean(model.anatomy)
    groups = [_candidates(ranking, kind, count, 0) for kind in ("heads", "neurons")]  # type: ignore[arg-type]
    edits: list[SiteEdit] = [edit for group in groups for edit in _edits(group, replacement)]
    effects = ExactEffects(EditRun.of(model.replayer, examples, edits), replacement)
    with torch.inference_mode():
        effects.measure(loaded[0])  # proves replay, once
        seconds = statistics.median(timed(lambda e=e: effects.measure(e)) for e in loaded)  # type: ignore[misc]
    layers = model.anatomy.shape.layers
    share = sum((layers - edit.site.layer) / layers for edit in edits)
    rows = max(1, min(64, len(edits)))
    floor = share * row_seconds(model, loaded[0], rows)
    name = f"--confirm {count}: {len(edits)} sites with at most {SAMPLE} sampled per kind"
    return name, seconds, f"{seconds / floor:.2f} x the arithmetic"


if __name__ == "__main__":
    main()
