"""First stage of training: the projector learns to turn patches into the words for what they show.

Each patch of a drawn scene shows a thing, a part of the word in its blue box, or background. The target of
its image token is a mixture of the language model's own embeddings of the words for that: shape, color,
texture, size and place. Regression on these needs no pass through the language model, and afterwards the
language model reads image tokens as it reads words.
"""

import random

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from hones_eval.smol.assemble import IMAGE_TOKENS
from hones_eval.smol.inputs import Packer, Scaling, features
from hones_eval.toy.scenes import CELL, PLACES, SIDE, Scene, scene

GRID = int(IMAGE_TOKENS**0.5)
STEP = SIDE / GRID  # pixels of the drawn image per patch
PLACE_SHARE = 0.5  # of the words for a place, beside those for what is shown


class WordTargets:
    """The embeddings that image tokens should have, per patch of a scene."""

    def __init__(self, model: LlavaForConditionalGeneration, packer: Packer) -> None:
        """Read the language model's embeddings of the words that it is asked for."""
        self._embeddings = model.model.language_model.embed_tokens.weight.detach().float()
        self._packer = packer
        self._known: dict[str, Tensor] = {}

    def of(self, drawn: Scene) -> Tensor:
        """The target embeddings of a scene's patches, `[64, H]`."""
        rows = []
        for patch in range(IMAGE_TOKENS):
            row, column = divmod(patch, GRID)
            x, y = (column + 0.5) * STEP, (row + 0.5) * STEP
            place = PLACES[2 * (y >= CELL) + (x >= CELL)]
            rows.append(self._words(_shown(drawn, x, y)) + PLACE_SHARE * self._words(place))
        return torch.stack(rows)

    def _words(self, text: str) -> Tensor:
        """The sum of the embeddings of some words, scaled to the size of a single one."""
        if text not in self._known:
            ids = [i for word in text.split() for i in self._packer.word_ids(word)]
            self._known[text] = self._embeddings[ids].sum(0) / len(ids) ** 0.5
        return self._known[text]


def _shown(drawn: Scene, x: float, y: float) -> str:
    """What a scene shows at a point, in words."""
    for thing in drawn.things:
        left, top, right, bottom = thing.box
        if left <= x < right and top <= y < bottom:
            return f"{thing.size} {thing.texture} {thing.color} {thing.shape}"
    left, top, right, bottom = drawn.word_box
    return f"word {drawn.word}" if left <= x < right and top <= y < bottom else "nothing"


def teach_words(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    scaling: Scaling,
    *,
    steps: int,
    images: int,
    rate: float,
    first: int,
) -> list[float]:
    """Train the projector on scenes `first`, `first + 1`, ... of the training split.

    Returns: the share of the targets' variance that is left, per step.
    """
    targets, projector = WordTargets(model, packer), model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    left = []
    for step in range(steps):
        scenes = [scene("train", first + step * images + i) for i in range(images)]
        batch = packer.pack(scenes, [[]] * images, random.Random(step))
        target = torch.stack([targets.of(drawn) for drawn in scenes])
        found = projector((features(model, batch.pixels) - scaling.mean) / scaling.deviation)
        loss = nn.functional.mse_loss(found, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        left.append(float(loss.detach() / target.var()))
    return left
