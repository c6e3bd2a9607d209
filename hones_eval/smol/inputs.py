"""What training feeds to the parts: packed questions, and the vision tower's features on one scale."""

import random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from hones_eval.smol.assemble import FEATURE_LAYERS
from hones_eval.toy import packing
from hones_eval.toy.drawing import to_image
from hones_eval.toy.scenes import scene


class Scaling(NamedTuple):
    """Mean and standard deviation of each feature of the vision tower, `[3 * 384]`.

    The projector is trained on standardized features: the raw ones vary by a tenth of their means. At the end
    the two are folded into its first layer, so that the checkpoint is an ordinary LLaVA.
    """

    mean: Tensor
    deviation: Tensor


class Packer(packing.Packer):
    """Packs questions with the tokenizer, chat template and image processor that evaluation uses."""

    skips_long_texts = True

    def word_ids(self, word: str) -> list[int]:
        """The tokens of a word in the middle of a sentence."""
        return self._ids(f" {word}")

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _pixels(self, images: list[NDArray[np.uint8]]) -> Tensor:
        drawn = [to_image(pixels) for pixels in images]
        made: Tensor = self.processor.image_processor(drawn, return_tensors="pt")["pixel_values"]
        return made


@torch.no_grad()
def features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector reads of some images, `[B, 64, 3 * 384]` in float32."""
    tower = model.model.vision_tower
    states = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], dim=-1).float()


def measure_scaling(model: LlavaForConditionalGeneration, packer: Packer, images: int = 64) -> Scaling:
    """Measure the features' scaling on the first images of the training split."""
    pixels = packer.pack([scene("train", i) for i in range(images)], [[]] * images, random.Random()).pixels
    found = features(model, pixels).flatten(0, 1)
    return Scaling(found.mean(0), found.std(0))
