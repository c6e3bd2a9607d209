"""Pretrain the image tower before the decoder is trained.

Linear heads, discarded afterwards, read everything about a cell from each image token that lies in it:
shape or letters, colour, texture, size and box. The decoder then starts with informative tokens, which
avoids the long plateau at the start of end-to-end training. For the same reason the embeddings of words are
initialized with the directions of these heads: 'circle', as input token and as answer, points where the
image tokens of a circle point.
"""

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from hones_eval.toy import drawing
from hones_eval.toy.model import PATCH, build_tokenizer
from hones_eval.toy.packing import to_pixels
from hones_eval.toy.prompts import letters
from hones_eval.toy.scenes import CELL, COLORS, SHAPES, SIDE, SIZES, TEXTURES, Box, Scene, scene

_Heads = dict[str, nn.Linear]
_NONE = -100
_CLASSES = {
    "content": len(SHAPES) + 2,  # nothing, a word, or one of the shapes
    "color": len(COLORS),
    "texture": len(TEXTURES),
    "size": len(SIZES),
    **{f"letter {i}": len(letters()) for i in range(3)},
    **dict.fromkeys(("left", "top", "right", "bottom"), SIDE // 2 + 1),
}
_WORDS = {
    "content": ("nothing", "word", *SHAPES),
    "color": COLORS,
    "texture": TEXTURES,
    "size": SIZES,
    "letter 0": letters(),
    "letter 1": [f"##{letter}" for letter in letters()],
}
_TOKENS_ACROSS = SIDE // PATCH


def teach_sight(
    model: LlavaForConditionalGeneration, seed: int, steps: int, images: int, rate: float
) -> float:
    """Train image tower and projector in place; returns the mean loss of the last steps."""
    heads = {name: nn.Linear(model.lm_head.in_features, n) for name, n in _CLASSES.items()}
    tower = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    parameters = [*tower, *(p for head in heads.values() for p in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    recent = 0.0
    for step in range(steps):
        first = 5_000_000 + (seed * steps + step) * images % 5_000_000
        loss = _loss(model, heads, [scene("train", first + i) for i in range(images)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent = 0.98 * recent + 0.02 * loss.item() if step else loss.item()
    _name_directions(model, heads)
    return recent


@torch.no_grad()
def _name_directions(model: LlavaForConditionalGeneration, heads: _Heads) -> None:
    """Set the input and output embeddings of each head's words to the head's centred, rescaled directions."""
    tables: list[torch.Tensor] = [model.model.language_model.embed_tokens.weight, model.lm_head.weight]
    ids = build_tokenizer().get_vocab()
    for name, words in _WORDS.items():
        weight = heads[name].weight
        directions = nn.functional.normalize(weight - weight.mean(0), dim=1)
        for table in tables:
            length = table.norm(dim=1).mean()
            table[[ids[word] for word in words]] = length * directions


def _loss(model: LlavaForConditionalGeneration, heads: _Heads, scenes: list[Scene]) -> torch.Tensor:
    pixels = to_pixels([drawing.draw(scene) for scene in scenes])
    tokens = torch.stack(list(model.model.get_image_features(pixels).pooler_output))  # [B, 16, D]
    targets = torch.tensor([[_facts(scene, cell) for cell in range(4)] for scene in scenes])  # [B, 4, F]
    at_token = targets[:, _cell_of_token()]  # [B, 16, F]
    losses = [
        nn.functional.cross_entropy(
            heads[name](tokens).flatten(0, 1), at_token[:, :, i].flatten(), ignore_index=_NONE
        )
        for i, name in enumerate(_CLASSES)
    ]
    return torch.stack(losses).mean()


def _cell_of_token() -> torch.Tensor:
    """The cell, 0 to 3, that each image token lies in, in the tower's order."""
    row, column = torch.meshgrid(torch.arange(_TOKENS_ACROSS), torch.arange(_TOKENS_ACROSS), indexing="ij")
    return (2 * (row * PATCH // CELL) + column * PATCH // CELL).flatten()


def _facts(scene: Scene, cell: int) -> list[int]:
    """The class for each head, or `_NONE` if the head does not apply to this cell."""
    if _cell_of(scene.word_box) == cell:
        spelled = [letters().index(letter) for letter in scene.word]
        return [1, _NONE, _NONE, _NONE, *spelled, *(edge // 2 for edge in scene.word_box)]
    for thing in scene.things:
        if _cell_of(thing.box) == cell:
            look = [COLORS.index(thing.color), TEXTURES.index(thing.texture), SIZES.index(thing.size)]
            return [
                2 + SHAPES.index(thing.shape),
                *look,
                _NONE,
                _NONE,
                _NONE,
                *(edge // 2 for edge in thing.box),
            ]
    return [0] + [_NONE] * (len(_CLASSES) - 1)


def _cell_of(box: Box) -> int:
    return 2 * (box[1] // CELL) + box[0] // CELL
