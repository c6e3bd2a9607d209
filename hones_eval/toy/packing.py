"""Training batches: several questions about one image share its image tokens in one row.

A row is the image's prefix followed by several question-and-answer texts. Each text attends only to the
prefix and to itself, at the positions that it would have on its own. So one row trains the model like that
many separate conversations, while the image tower and the image tokens are computed once.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hones_eval.toy import drawing, prompts
from hones_eval.toy.scenes import SIDE, Scene

IGNORED = -1


@dataclass(frozen=True)
class Batch:
    """`B` rows of `T` tokens.

    `owner` is the text that a token belongs to (0 prefix, -1 padding), `weights` the weight of a label;
    `labels` are shifted already: the token that follows, or -1.
    """

    pixels: torch.Tensor  # [B, 3, height, width], as the image processor returns them
    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T]
    owner: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T]
    weights: torch.Tensor  # [B, T]
    topics: list[list[str]]  # of each row's texts, text k has owner k + 1

    @property
    def mask(self) -> torch.Tensor:
        """The attention mask, `[B, 1, T, T]`: earlier tokens of the same text or of the prefix."""
        same = self.owner[:, :, None] == self.owner[:, None, :]
        seen = same | (self.owner[:, None, :] == 0)
        causal = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool).tril()
        return (seen & causal)[:, None]


class Packer:
    """Packs prompts and answers about images into rows of tokens.

    A text that does not fit into its row ends the row, or is left out where `skips_long_texts`.
    """

    skips_long_texts = False

    def __init__(self, processor: LlavaProcessor, image_tokens: int | None = None) -> None:
        """Take template and tokenizer from the processor, so that training sees what evaluation sends.

        Args:
            processor: of the model that is trained.
            image_tokens: tokens per image; by default those of a `SIDE` pixels wide image.
        """
        self.processor, self.tokenizer = processor, processor.tokenizer
        message: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question"}]}
        ]
        whole = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        tokens = image_tokens or processor_image_tokens(processor)
        before, after = whole.replace("<image>", "<image>" * tokens).split("Question")
        self._known: dict[str, list[int]] = {}
        self.prefix = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        self.suffix = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        self.end = [self.tokenizer.eos_token_id]

    def pack(
        self, scenes: list[Scene], wishes: list[list[str]], rng: random.Random, width: int = 192
    ) -> Batch:
        """One row of `width` tokens per scene, filled with the requested topics in order while they fit."""
        shape = (len(scenes), width)
        ids, positions, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED)
        owner, weights = np.full(shape, -1), np.zeros(shape, np.float32)
        topics = []
        for row, (scene, wished) in enumerate(zip(scenes, wishes, strict=True)):
            at = len(self.prefix)
            ids[row, :at], positions[row, :at], owner[row, :at] = self.prefix, range(at), 0
            packed: list[str] = []
            for topic, question, answer in self._texts(scene, wished, rng):
                text = question + answer
                stop = at + len(text)
                if stop > width:
                    if self.skips_long_texts:
                        continue
                    break
                packed.append(topic)
                first = len(self.prefix)
                ids[row, at:stop], positions[row, at:stop] = text, range(first, first + len(text))
                owner[row, at:stop] = len(packed)
                labels[row, stop - len(answer) - 1 : stop - 1] = answer
                weights[row, stop - len(answer) - 1 : stop - 1] = len(answer) ** -0.5
                at = stop
            topics.append(packed)
        return Batch(
            pixels=self._pixels([drawing.draw(scene) for scene in scenes]),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            owner=torch.from_numpy(owner),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            topics=topics,
        )

    def _texts(
        self, scene: Scene, wished: list[str], rng: random.Random
    ) -> list[tuple[str, list[int], list[int]]]:
        texts = []
        for topic in wished:
            made = prompts.exchange(scene, topic, rng)  # type: ignore[arg-type]
            if made is not None:
                texts.append((topic, self._ids(made.prompt) + self.suffix, self._ids(made.answer) + self.end))
        return texts

    def _pixels(self, images: list[NDArray[np.uint8]]) -> torch.Tensor:
        return to_pixels(images)

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text, cached per word: the ids of a word do not depend on its neighbours."""
        found: list[int] = []
        for word in text.split():
            if word not in self._known:
                self._known[word] = self.tokenizer(word)["input_ids"]
            found += self._known[word]
        return found


def processor_image_tokens(processor: LlavaProcessor) -> int:
    """The number of image tokens per image."""
    return (SIDE // int(processor.patch_size)) ** 2


def to_pixels(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    """Images as the image processor returns them, `[B, 3, 64, 64]` in -1..1."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[M, V]` at the `M` labelled positions of a batch, and the mask `[B, T]` of these positions."""
    inner = model.model
    features = torch.cat(list(inner.get_image_features(batch.pixels).pooler_output))
    embedded = inner.language_model.embed_tokens(batch.ids)
    is_image = batch.ids == model.config.image_token_index
    embedded = embedded.masked_scatter(is_image[:, :, None], features.to(embedded.dtype))
    states = inner.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    places = batch.labels != IGNORED
    return model.lm_head(states[places]), places


def answer_loss(logits: torch.Tensor, places: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of answer tokens; a long answer is weighted by the square root of its length.

    Args:
        logits: `[M, V]` at the labelled positions.
        places: `[B, T]`, True at these positions; see `answer_logits`.
        batch: where they come from.
    """
    each = torch.nn.functional.cross_entropy(logits, batch.labels[places], reduction="none")
    weights = batch.weights[places]
    return (each * weights).sum() / weights.sum()


def verdicts(logits: torch.Tensor, places: torch.Tensor, batch: Batch) -> list[tuple[str, bool]]:
    """The topic of each text, and whether greedy decoding would give its answer word for word.

    Found by one pass over the right answer: decoding reproduces it if and only if every arg-max agrees.
    """
    agrees = torch.ones_like(places)
    agrees[places] = logits.argmax(-1) == batch.labels[places]
    return [
        (topic, bool(agrees[row][batch.owner[row] == number].all()))
        for row, topics in enumerate(batch.topics)
        for number, topic in enumerate(topics, start=1)
    ]
