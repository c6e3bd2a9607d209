"""`--model hones_hf`: any Hugging Face vision-language model with a chat template, steered.

It serves families for which lmms-eval has no wrapper that works with current transformers: every model that
`AutoModelForImageTextToText` loads and whose processor has a chat template. PaliGemma needs no template.
Decoder-only language models that `AutoModelForCausalLM` loads answer the tasks that show no image.
"""

import inspect
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, cast

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hones_eval.core.offloading import device_of
from hones_eval.errors import HonesError

from .hf_requests import (
    Asked,
    Messages,
    alike,
    as_part,
    cut,
    generation,
    images,
    parts,
    texts,
    visual_part,
)
from .settings import until
from .steered import Steered
from .text_only import TextProcessor, load_processor, model_class

WITHOUT_TEMPLATE = ("paligemma",)
"""Families that are prompted without a chat template: images, then the text."""


class HfModel(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """A chat model of lmms-eval that uses transformers' own prompting, in batches padded on the left."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        revision: str = "main",
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """Load model and processor.

        Args:
            pretrained: a folder or a hub id.
            revision: a branch, tag or commit on the hub.
            device: the model's device when there is no `device_map`.
            device_map: as in transformers; `auto` spreads one model over several GPUs.
            dtype: `auto` for the checkpoint's own, or the name of a torch type.
            batch_size: the number of questions per batch.
            attn_implementation: `eager`, `sdpa`, `flash_attention_2`; transformers chooses by default.
            chat_template: a Jinja file to use instead of the processor's template.
            trust_remote_code: run code that comes with the checkpoint.
            unknown: any other argument is an error.

        Raises: HonesError when the model cannot be loaded or prompted.
        """
        super().__init__()
        _refuse_unknown(unknown)
        if not pretrained:
            raise HonesError("pretrained= is missing: give a folder or a Hugging Face hub id")
        self.batch_size_per_gpu = _count(batch_size)
        shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        place = {"dtype": _dtype(dtype), "device_map": device_map, "attn_implementation": attn_implementation}
        try:
            cls = model_class(pretrained, revision, trust_remote_code)
            model: Any = cls.from_pretrained(pretrained, **shared, **place)
            reads_images = cls is AutoModelForImageTextToText
            self.processor: Any = (AutoProcessor.from_pretrained if reads_images else load_processor)(
                pretrained, **shared
            )
        except (OSError, ValueError, ImportError) as error:
            raise HonesError(f"{pretrained} cannot be loaded: {' '.join(str(error).split())}") from error
        if not device_map:
            model.to(_own_device(device))
        self._model: Any = model.eval()
        self._prepare_tokenizer()
        self._prompted_plainly = self._prompts_plainly(pretrained, chat_template)

    @classmethod
    def around(cls, model: PreTrainedModel, processor: Any) -> Self:
        """A wrapper around a model that is already loaded, and its processor. Nothing is moved or copied.

        Raises: HonesError when the model cannot be prompted.
        """
        made = cls.__new__(cls)
        lmms.__init__(made)
        made.batch_size_per_gpu = 1
        made.processor = TextProcessor(processor) if _is_tokenizer(processor) else processor
        made._model = model.eval()
        made._prepare_tokenizer()
        made._prompted_plainly = made._prompts_plainly(str(model.config.name_or_path), None)
        return made

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model."""
        return cast(PreTrainedModel, self._model)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """The device of the inputs; of an offloaded model, the one that it computes on."""
        return device_of(self.model)

    @property
    def batch_size(self) -> int:
        """The number of questions per batch."""
        return self.batch_size_per_gpu

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests; answers end before the first of the task's `until` strings."""
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for group in alike(requests):
                for start in range(0, len(group), self.batch_size_per_gpu):
                    batch = group[start : start + self.batch_size_per_gpu]
                    asked = [self._read(number, requests[number]) for number in batch]
                    for question, answer in self._batch(asked):
                        answers[question.number] = answer
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """Not supported. Raises: HonesError."""
        raise HonesError(
            "hones_hf does not support tasks with several rounds; use another model with --model hones"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: `Steered` computes log-likelihoods after the prompts of `generate_until`."""
        raise NotImplementedError

    def inputs_of(self, conversations: Sequence[Messages]) -> dict[str, Any]:
        """The arguments of `generate` for a batch of conversations, all with images or all without."""
        if self._prompted_plainly:
            inputs = self._plain_inputs(conversations)
        else:
            inputs = self.processor.apply_chat_template(
                list(conversations),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
        placed = inputs.to(self.device, self._model.dtype)
        return {name: value for name, value in placed.items() if name != "labels"}

    def _read(self, number: int, request: Instance) -> Asked:
        _, source, settings, doc_id, task, split = request.args
        messages = [
            {"role": message["role"], "content": [as_part(part) for part in parts(message["content"])]}
            for message in source(self.task_dict[task][split][doc_id])
        ]
        return Asked(number, messages, settings)

    def _batch(self, asked: list[Asked]) -> Iterable[tuple[Asked, GenerationResult]]:
        # Processors take a batch in which every row has images, or in which none does.
        for with_images in (True, False):
            rows = [question for question in asked if bool(images(question.messages)) == with_images]
            if rows:
                yield from zip(rows, self._generate(rows), strict=True)

    def _generate(self, asked: list[Asked]) -> list[GenerationResult]:
        inputs = self.inputs_of([question.messages for question in asked])
        settings = {"pad_token_id": self.tokenizer.pad_token_id} | generation(asked[0].settings)
        output = self._model.generate(**inputs, **settings)
        prompt: Tensor = inputs["input_ids"]
        if not torch.equal(output[:, : prompt.shape[1]], prompt.to(output.device)):
            raise HonesError(
                f"{type(self._model).__name__} does not return its prompt before its answer, as decoder-only "
                "models of transformers do, so hones_hf cannot tell where the answer begins"
            )
        new = output[:, prompt.shape[1] :]
        decoded = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        ends = until(asked[0].settings)
        counts = (new != self.tokenizer.pad_token_id).sum(1).tolist()
        return [
            GenerationResult(cut(text, ends), TokenCounts(output_tokens=count))
            for text, count in zip(decoded, counts, strict=True)
        ]

    def _plain_inputs(self, conversations: Sequence[Messages]) -> Any:
        """One image token per image, then all texts; the processor does the rest."""
        if isinstance(self.processor, TextProcessor):
            return self.processor.plain_inputs(conversations)
        shown = [images(messages) for messages in conversations]
        if not all(shown):
            raise HonesError(f"{type(self._model).__name__} needs an image with every question")
        prompts = [
            self.processor.image_token * len(own) + "\n".join(texts(messages))
            for own, messages in zip(shown, conversations, strict=True)
        ]
        return self.processor(
            text=prompts, images=shown, padding=True, padding_side="left", return_tensors="pt"
        )

    def _prepare_tokenizer(self) -> None:
        if getattr(self._model.config, "is_encoder_decoder", False):
            raise HonesError(
                f"{type(self._model).__name__} is an encoder-decoder model; hones_hf needs a decoder-only one"
            )
        if getattr(self.processor, "tokenizer", None) is None:
            raise HonesError(f"{type(self.processor).__name__} has no tokenizer, which is needed to prompt")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _prompts_plainly(self, pretrained: str, chat_template: str | None) -> bool:
        """Whether the model is prompted without a chat template; `chat_template` overrides it."""
        if chat_template is not None:
            path = Path(chat_template).expanduser()
            if not path.is_file():
                raise HonesError(f"chat_template={chat_template}: no such file")
            self.processor.chat_template = path.read_text(encoding="utf-8")
        if self.processor.chat_template is not None:
            return False
        if isinstance(self.processor, TextProcessor) or self._model.config.model_type in WITHOUT_TEMPLATE:
            return True
        raise HonesError(
            f"{pretrained} ({self._model.config.model_type}) has no chat template: give chat_template=<a "
            "Jinja file>, or use lmms-eval's wrapper of the family: --model hones --model_args base=..."
        )


class SimpleHfModel(HfModel):
    """The same with `--force_simple`: images first, then the task's text."""

    is_simple = True

    def _read(self, number: int, request: Instance) -> Asked:
        text, settings, source, doc_id, task, split = request.args
        return Asked(number, _one_turn(text, source(self.task_dict[task][split][doc_id])), settings)


class Hf(Steered, HfModel):
    """The steered model, prompted through the chat template."""

    base_wrapper = "hones_hf"


class SimpleHf(Steered, SimpleHfModel):
    """The steered model with `--force_simple`."""

    base_wrapper = "hones_hf"


def _one_turn(text: str, shown: Sequence[Any] | None) -> Messages:
    """One turn of a chat: images, then the text."""
    content = [as_part(visual_part(visual)) for visual in shown or []]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _is_tokenizer(processor: Any) -> bool:
    return isinstance(processor, PreTrainedTokenizerBase)


def _own_device(device: str | None) -> torch.device:
    """This process's own GPU where several processes share a node, otherwise the requested device."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return chosen


def _dtype(name: str) -> Any:
    if name == "auto":
        return name
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise HonesError(f"dtype={name!r} is unknown: use auto, bfloat16, float16 or float32")
    return found


def _count(batch_size: int | str) -> int:
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise HonesError(f"batch_size={batch_size!r} should be a whole number of at least 1")
    return int(batch_size)


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    known = [name for cls in (HfModel, Steered) for name in inspect.signature(cls.__init__).parameters]
    known = [name for name in known if name not in ("self", "unknown", "kwargs")]
    unknown = {name: value for name, value in unknown.items() if name != "max_batch_size"}
    if unknown:
        name = next(iter(unknown))
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
        raise HonesError(f"hones_hf has no argument {name!r}: {hint}")
