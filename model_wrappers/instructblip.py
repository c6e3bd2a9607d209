"""`--model hones_instructblip`: lmms-eval's `instructblip`, steered, without the prompt in its answers."""

from collections.abc import Mapping
from typing import Any

import torch
from lmms_eval.models.simple.instructblip import InstructBLIP
from torch import Tensor

from .steered import Steered


class InstructBlip(Steered, InstructBLIP):  # type: ignore[misc]
    """Steered `instructblip`.

    With a decoder-only language model, `generate` returns the prompt before the answer, and the stock wrapper
    decodes and scores both. Here the prompt is removed.
    """

    base_wrapper = "instructblip"
    own_likelihoods = False

    def generated(self, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
        """The new tokens of `output` [batch, prompt + new], whose prompt is removed where there is one."""
        prompt = inputs["input_ids"]
        length = prompt.shape[1]
        echoed = output.shape[1] >= length and torch.equal(output[:, :length], prompt.to(output.device))
        return output[:, length:] if echoed else output
