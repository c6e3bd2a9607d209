"""`Anatomy.logits` gives the model's own logits, also where they are scaled or masked, or it is refused."""

from typing import Any

import census
import families
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering
from hones_eval.engine.activations import LayerViews
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.methods.lens import LogitLens

IDS = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(0))


class Scaled(LlavaForConditionalGeneration):
    """Divides its logits, as Granite does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 8
        return output


class Masked(LlavaForConditionalGeneration):
    """Never answers with some tokens, as Chameleon."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 20:40] = torch.finfo(output.logits.dtype).min
        return output


class Centered(LlavaForConditionalGeneration):
    """Logits that depend on those of all tokens, which cannot be repeated for one hidden state."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output


def built(kind: type[PreTrainedModel]) -> families.Family:
    family = families.build("llava")
    family.model.__class__ = kind
    return family


def example(family: families.Family) -> Example:
    inputs = dict(family.inputs("Is the cat black?", [Image.new("RGB", (64, 48), "red")]))
    return Example(0, "drawn", "test", 0, inputs, {}, "x", ["x"], [30, 31], [], "")


@pytest.mark.parametrize("kind", [Scaled, Masked])
def test_the_lens_reports_the_probabilities_of_the_model(kind: type[PreTrainedModel]) -> None:
    family = built(kind)
    anatomy, shown = Anatomy.of(family.model), example(family)
    with torch.no_grad():
        expected = family.model(**shown.inputs).logits[0].float().softmax(-1)
        unscaled = family.model.lm_head(LayerViews(anatomy, shown.inputs).view("block", -1))
    record = LogitLens(anatomy, family.tokenizer, chosen="all", top=5).measure(shown).record
    found = record.readout
    torch.testing.assert_close(found.top_probabilities[-1, -1], expected.topk(5).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.answer[-1, -1], expected[:, [30, 31]].sum(-1), rtol=1e-4, atol=1e-6)
    assert (unscaled.softmax(-1) - expected).abs().max() > 0.05, "the model's last step makes no difference"
    if kind is Masked:
        assert not set(range(20, 40)) & set(found.top_ids.flatten().tolist())


def test_logits_that_cannot_be_repeated_are_refused_in_one_line_and_steering_is_not() -> None:
    family = built(Centered)
    anatomy, shown = Anatomy.of(family.model), example(family)
    message = "Centered scales or masks its logits in a way that cannot be repeated for other hidden states"
    for attempt in (
        lambda: anatomy.logits(torch.zeros(1, anatomy.shape.hidden)),
        lambda: LogitLens(anatomy, family.tokenizer).measure(shown),
    ):
        with pytest.raises(HonesError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    replayer = Replayer(anatomy)
    replayer.record(shown.inputs, 1)
    assert replayer.inexact is not None
    assert message in replayer.inexact
    steering = Steering.by_hand(family.model, neurons={(1, 3): 9.0})
    with torch.no_grad():
        plain = family.model(**shown.inputs).logits
        with steer(family.model, steering):
            assert (family.model(**shown.inputs).logits - plain).abs().max() > 1e-3


@torch.no_grad()
def last_hidden(anatomy: Anatomy, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the last layer gives, and the model's logits, in one pass."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = anatomy.layers[-1].register_forward_hook(keep)
    logits = anatomy.model(**inputs, use_cache=False).logits
    handle.remove()
    return seen[-1], logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granite_docling", "muse_glimmer"])
def test_real_families_that_scale_their_logits(name: str) -> None:
    model = census.build(name)
    if name == "granite_docling":
        model.config.text_config.logits_scaling = 8.0
    anatomy = Anatomy.of(model)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    hidden, logits = last_hidden(anatomy, inputs)
    with torch.no_grad():
        torch.testing.assert_close(anatomy.logits(hidden), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(anatomy.logits(hidden[0, 2:4]), logits[0, 2:4], rtol=1e-4, atol=1e-4)
        direct = anatomy._direct_logits(hidden)
    assert (direct - logits).abs().max() > 1e-3, "the last step of this family makes no difference"
