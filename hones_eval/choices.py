"""The values that flags and arguments may take, in one module that imports nothing heavy.

The command line and the type hints of the heavy modules share these names, so that `--help` needs no torch.
"""

from typing import Literal

from hones_eval.errors import HonesError

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""A floating-point type of a model; `auto` leaves it as the wrapper loads it."""
Rows = int | Literal["auto"]
"""How many rows go through the model at once; `auto` fits them to the device."""

Sites = Literal["auto", "neurons", "heads"]
"""Which sites are masked; `auto` is heads for V-SEAM's rankings and neurons for the others."""
Bound = Literal["betting", "bernstein"]
"""The confidence bound that a race of heads uses."""
Screen = Literal["first_order"]
"""The estimate by which heads are screened before they are measured."""

HowNeurons = Literal[
    "grid", "search", "learned", "learned_no_kl", "random", "tuned", "halving", "signed_neurons"
]
"""Ways to choose the scales of neurons on development examples."""
HowHeads = Literal["signed", "topk"]
"""Ways to scale heads by their scores."""
How = Literal[
    "fixed",
    "grid",
    "search",
    "learned",
    "learned_no_kl",
    "random",
    "tuned",
    "halving",
    "signed",
    "topk",
    "signed_neurons",
    "mean_difference",
]
"""Every way to scale."""
Way = Literal[
    "fixed",
    "grid",
    "search",
    "learned",
    "learned_no_kl",
    "tuned",
    "halving",
    "signed",
    "topk",
    "signed_neurons",
]
"""Ways to scale that a spike-in can repair with."""
CEILING, SPARSITY = 4.0, 0.2
"""Of `tuned`: the largest scale, and how strongly weak sites are held at 1."""
TunedSites = Literal["all", "heads", "neurons"]
"""The sites that `tuned` may scale."""
Neurons = float | Literal["all"]
"""A share of all neurons, or all of them."""
Plant = Literal["neurons", "heads", "random"]
"""The sites that a spike-in damps: a ranking's best neurons or heads, or random neurons."""

Correction = Literal["holm", "benjamini_hochberg"]
"""How p-values of rows that are reported together are corrected."""

What = Literal["image", "text", "last", "attention", "ffn"]
"""Which activations are patched in causal tracing."""
Pairs = Literal["all", "right"]
"""Which pairs of a clean and an edited example are averaged."""
Export = Literal["checkpoint", "ia3"]
"""The forms in which a steering is exported."""

ImagesShown = Literal["full", "small", "none"]
"""How a board shows images: thumbnails that open the image itself, thumbnails alone, or not at all."""

TaskKind = Literal["auto", "question", "choice", "caption", "box"]
"""The kinds of tasks that a table of images can become; `auto` decides by the columns."""

Level = Literal["object", "attribute", "relation"]
"""The semantic level of a question."""
Category = Literal["animal", "indoor", "vehicle", "color", "material", "action", "spatial"]
"""The categories of V-SEAM's questions."""
EditorName = Literal["auto", "remove", "recolor", "retexture", "move", "mirror", "inpaint", "folder"]
"""The editors of images."""
MaskName = Literal["cut", "box", "segmenter"]
"""How the region of an edit is found."""

Estimate = Literal["first_order", "ig"]
"""The estimates of attribution patching; `ig` are integrated gradients."""
Objective = Literal["log_probability", "margin"]
"""What attribution patching takes the gradient of."""
Absolute = Literal["example", "position"]
"""Of what attribution patching takes absolute values."""


def check_damage(damp: float, trials: int) -> None:
    """Raise HonesError for a damage that cannot be undone, or a number of random controls below 1."""
    if not 0 < damp < 1:
        raise HonesError(f"--damp {damp:g}: give a scale above 0, which can be undone, and below 1")
    if trials < 1:
        raise HonesError(f"--trials {trials}: give 1 or more random controls")
