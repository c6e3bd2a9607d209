"""The language model and its tokenizer: SmolLM2-135M-Instruct, read from a GGUF file."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hones_eval.errors import HonesError

IMAGE_TOKEN = "<image>"

# Content may be a string (lmms-eval's simple models) or a list of parts (its chat models, transformers).
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


def load_tokenizer(path: Path) -> Any:
    """Read the GGUF file's tokenizer, with a token for images and a chat template that takes images."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 2048
    return tokenizer


def load_language(path: Path) -> LlamaForCausalLM:
    """Read the GGUF file's weights, dequantized to float32, in a plain Llama model.

    A model that transformers read from GGUF carries its quantization settings along and cannot be saved as an
    ordinary checkpoint, so its weights are copied.

    Raises: HonesError when the `gguf` package is missing, or the file is not the expected model.
    """
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except ImportError:
        raise HonesError("smol build reads a GGUF file: pip install 'hones-eval[smol]'") from None
    config = LlamaConfig(
        vocab_size=read.config.vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    plain = LlamaForCausalLM(config)
    plain.eval()
    weights = read.state_dict()
    wrong = {
        name: tuple(tensor.shape)
        for name, tensor in plain.state_dict().items()
        if name not in weights or weights[name].shape != tensor.shape
    }
    if wrong:
        raise HonesError(
            f"{path.name} is not SmolLM2-135M: {len(wrong)} weights differ in shape or are missing, first "
            f"{next(iter(wrong))}"
        )
    plain.load_state_dict(weights)
    return plain
