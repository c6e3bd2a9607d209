"""`--model hones_instructblip`: lmms-eval's `instructblip`, steered, and without the echo of the prompt."""

from collections.abc import Mapping
from typing import Any

import torch
from lmms_eval.models.simple.instructblip import InstructBLIP
from torch import Tensor

from .steered import Steered


class InstructBlip(Steered, InstructBLIP):  # type: ignore[misc]
    """Steered `instructblip`.

    With a decoder-only language model, `generate` gives the prompt back in front of the answer, and the
    stock wrapper decodes and scores both. Here the prompt is cut off.
    """

    base_wrapper = "instructblip"
    own_likelihoods = False

    def generated(self, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
        """The new tokens alone, `output` [batch, prompt + new] without the prompt when it is in there."""
        prompt = inputs["input_ids"]
        length = prompt.shape[1]
        echoed = output.shape[1] >= length and torch.equal(output[:, :length], prompt.to(output.device))
        return output[:, length:] if echoed else output
