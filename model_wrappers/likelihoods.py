"""Log-likelihoods of choices: computed after the prompts that a wrapper generates from.

Most wrappers of lmms-eval have no working log-likelihoods. For them a choice's value is the mean loss of its
tokens after the prompt, of which lmms-eval's multiple-choice tasks take the smallest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hones_eval.core.scope import answer_follows
from hones_eval.engine.prompts import appended
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.tokens import answer_tokens
from hones_eval.lmms.call_capture import Call, StandInForGenerate, replaced
from hones_eval.lmms.calls import quiet

BIDIRECTIONAL = ("paligemma",)
"""Families that attend to prompts in both directions: an answer's tokens have another type there."""


def as_results(likelihoods: Iterable[Sequence[Any]]) -> list[GenerationResult]:
    """Values and greediness in the one form that lmms-eval's evaluator leaves unchanged.

    It converts anything else that a model returns to text, although its own tasks then expect pairs.
    """
    return [GenerationResult(cast(Any, (float(value), bool(greedy)))) for value, greedy in likelihoods]


@torch.inference_mode()
def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Mapping[str, Any], choice: str
) -> tuple[float, bool]:
    """The mean loss of a choice's tokens after a prompt, and whether each of them is the likeliest.

    Args:
        model: may be steered.
        tokenizer: the model's.
        prompt: the arguments of `forward`, a batch of one.
        choice: the choice in words.
    """
    ids = answer_tokens(tokenizer, prompt["input_ids"][0].tolist(), choice)
    inputs = appended(prompt, ids, int(model.config.model_type in BIDIRECTIONAL))
    labels = inputs["input_ids"].clone()
    labels[:, : -len(ids)] = -100  # the prompt has no loss
    with answer_follows(model, len(ids)):
        logits = model(**inputs, labels=labels).logits[0, -len(ids) - 1 : -1].float()
    target = labels[0, -len(ids) :].to(logits.device)
    return float(cross_entropy(logits, target)), bool((logits.argmax(-1) == target).all())


def recorded_prompt(
    model: PreTrainedModel,
    generate_until: Callable[[list[Instance]], Any],
    request: Instance,
    *,
    simple: bool,
) -> dict[str, Any]:
    """The prompt that a wrapper generates from, for a log-likelihood request.

    Args:
        model: inside the wrapper.
        generate_until: the wrapper's.
        request: the log-likelihood request.
        simple: whether the wrapper takes requests in lmms-eval's simple form.

    Raises: HonesError unless the wrapper calls `generate` once.
    """
    text, _, source, *where = request.args
    parts = (text, {}, source) if simple else (text, partial(_messages, text, source), {})
    asked = Instance("generate_until", (*parts, *where), request.idx, dict(request.metadata))
    stand_in = StandInForGenerate(model, [], with_prompt=True)
    with replaced(model, "generate", stand_in), quiet():
        generate_until([asked])
    if len(stand_in.calls) != 1:
        raise HonesError(
            f"task {request.task_name}, doc {request.doc_id}: the wrapper called generate "
            f"{len(stand_in.calls)} times for one question, so its prompt is unknown"
        )
    return Call.of(model, stand_in.calls[0]).inputs


def _messages(text: str, source: Callable[[Any], Any], doc: Any) -> list[dict[str, Any]]:
    """A question with its images as one turn of a chat."""
    images = [{"type": "image", "url": image} for image in source(doc) or []]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
