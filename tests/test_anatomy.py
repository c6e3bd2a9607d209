"""Where heads, neurons, unembedding and image tokens are, in every family that is served."""

from collections.abc import Callable

import families
import plain
import pytest
import torch
from families import Family
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape
from hones_eval.errors import HonesError, UnsupportedModelError

RED, BLUE = (Image.new("RGB", size, colour) for size, colour in (((64, 48), "red"), ((40, 90), "blue")))

# Layers and hidden / head width where they are not 3, 64 / 16, as their recipes state.
SPECIAL = {
    "llava": {"layers": 4},
    "qwen2_5_vl": {"layers": 4},
    "qwen3_vl": {"layers": 4},
    "gemma3": {"hidden": 48},
    "paligemma": {"hidden": 48},
}


def test_sizes_are_those_of_the_recipe_and_of_the_configuration(family: Family) -> None:
    shape = Anatomy.of(family.model).shape
    vocabulary = family.model.config.get_text_config().vocab_size
    expected = {"layers": 3, "heads": 4, "head_width": 16, "hidden": 64, "neurons": 96}
    assert shape == ModelShape(**expected | SPECIAL.get(family.name, {}), vocabulary=vocabulary)
    text = family.model.config.get_text_config()
    assert (shape.layers, shape.neurons) == (text.num_hidden_layers, text.intermediate_size)


def test_parts_are_those_of_the_language_model(family: Family) -> None:
    anatomy = Anatomy.of(family.model)
    stack = plain.layers(family.model)
    assert anatomy.layers == stack
    assert [site.module for site in anatomy.heads_in] == [layer.self_attn.o_proj for layer in stack]
    assert [site.module for site in anatomy.neurons_in] == [layer.mlp.down_proj for layer in stack]
    assert anatomy.attentions == [layer.self_attn for layer in stack]
    assert anatomy.ffns == [layer.mlp for layer in stack]
    assert anatomy.final_norm is plain.language_model(family.model).norm
    assert anatomy.heads_in[1].name == "layers.1.self_attn.o_proj"
    assert anatomy.neurons_in[0].width == anatomy.down_weight(0).shape[1]


def test_norm_unembedding_and_cap_give_the_models_logits(family: Family) -> None:
    anatomy = Anatomy.of(family.model)
    seen = []
    handle = anatomy.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = family.inputs("How many?", [RED])
    with torch.no_grad():
        logits = family.model(**inputs).logits
        torch.testing.assert_close(anatomy.logits(seen[0]), logits, atol=1e-5, rtol=0)
    handle.remove()
    assert (anatomy.soft_cap == 3.0) == (family.name == "paligemma")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_unembedding_is_found_tied_or_not(name: str, tied: bool) -> None:
    model = families.build(name, tied=tied).model
    unembedding = Anatomy.of(model).unembedding
    assert unembedding is model.lm_head.weight
    assert (unembedding is model.get_input_embeddings().weight) == tied


def test_a_head_is_wider_than_its_share_of_the_hidden_states(
    build_family: Callable[[str], Family],
) -> None:
    for name in ("gemma3", "paligemma"):
        shape = Anatomy.of(build_family(name).model).shape
        assert shape.head_width == 16 != shape.hidden // shape.heads


def test_image_positions_are_the_processors_placeholders(family: Family) -> None:
    anatomy = Anatomy.of(family.model)
    texts, pictures = ["How many?", "What color is it, and how many?"], [[RED], [BLUE]]
    several = [[RED, BLUE], [BLUE]] if family.several_images else pictures
    placeholder = family.tokenizer.convert_ids_to_tokens(int(family.model.config.image_token_id))
    for shown in (pictures, several):
        inputs = family.inputs(texts, shown)
        mask = anatomy.image_positions(inputs)
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            tokens = family.tokenizer.convert_ids_to_tokens(ids)
            assert mask[row].tolist() == [token == placeholder for token in tokens]
    assert int(mask[0].sum()) > 0
    if family.several_images:
        assert int(anatomy.image_positions(family.inputs(texts, several))[0].sum()) > int(
            anatomy.image_positions(family.inputs(texts, pictures))[0].sum()
        )


def test_pictures_act_at_the_image_positions(family: Family) -> None:
    """Another picture of the same size changes what enters the first layer there, and nowhere else."""
    anatomy = Anatomy.of(family.model)
    entered = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    handle = anatomy.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    texts = ["How many?", "What color is it, and how many?"]
    batches = [family.inputs(texts, [[shown], [RED]]) for shown in (RED, noise)]
    with torch.no_grad():
        for inputs in batches:
            family.model(**inputs)
    handle.remove()
    changed = (entered[0] - entered[1]).abs().amax(-1) > 0
    expected = anatomy.image_positions(batches[0])
    newline = getattr(family.model.model, "image_newline", None) if hasattr(family.model, "model") else None
    if newline is not None:  # learned, at the end of every row of tiles
        assert bool((entered[0][expected] == newline).all(-1).any())
        expected = expected & ~(entered[0] == newline).all(-1)
    expected[1] = False
    assert torch.equal(changed, expected)


def test_a_prompt_without_a_picture_has_no_image_positions(build_family: Callable[[str], Family]) -> None:
    family = build_family("qwen2_5_vl")
    with pytest.raises(HonesError, match="the prompt has no image"):
        Anatomy.of(family.model).image_positions(family.inputs("How many?", []))


REASONS = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion: the configuration .* states no number of layers, so "
    "it is not one decoder stack that answers token by token",
}


@pytest.mark.parametrize("name", families.REFUSED_NAMES)
def test_what_is_not_served_is_refused_by_name_with_the_reason(name: str) -> None:
    model = families.build_refused(name)
    with pytest.raises(UnsupportedModelError, match=REASONS[name]) as caught:
        Anatomy.of(model)
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a Hugging Face PreTrainedModel"):
        Anatomy.of(nn.Linear(2, 2))


# The proofs by experiment, each against a small Llama that breaks what is proven.


def llama(**changes: int) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_language_model_alone_is_served() -> None:
    assert Anatomy.of(llama(head_dim=10)).shape == ModelShape(2, 4, 10, 32, 48, 60)


def test_edits_that_change_no_logit_are_refused() -> None:
    model = llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    with pytest.raises(UnsupportedModelError, match=r"zeroing layers.1.self_attn.o_proj changes no logit"):
        Anatomy.of(model)


def test_layers_that_are_gone_round_are_refused() -> None:
    model = llama()
    ours = model.model.layers[1]
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(UnsupportedModelError, match=r"no heads were found in layers.1, though layers.0 has"):
        Anatomy.of(model)
    assert not ours._forward_hooks


def test_a_width_that_the_configuration_denies_is_refused() -> None:
    model = llama()
    model.config.head_dim = 7
    with pytest.raises(UnsupportedModelError, match=r"o_proj takes 32 features, .* 4 heads of 7"):
        Anatomy.of(model)
    model.config.head_dim = None
    model.config.num_attention_heads = 5
    with pytest.raises(UnsupportedModelError, match="32 features, not a multiple of 5 heads"):
        Anatomy.of(model)


def test_two_lists_of_layers_are_refused() -> None:
    model = llama()
    model.model.others = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match="one list of 2 layers, found 2"):
        Anatomy.of(model)


def test_quantized_down_projections_have_no_write_vectors(build_family: Callable[[str], Family]) -> None:
    anatomy = Anatomy.of(build_family("llava").model)
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    anatomy.neurons_in[0] = anatomy.neurons_in[0]._replace(module=packed)
    with pytest.raises(HonesError, match=r"layers.0.mlp.down_proj is quantized"):
        anatomy.down_weight(0)
