"""The pure edits compared with numpy, and the shapes they accept."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from hones_eval.core import edits


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def numpy_replaced(x: np.ndarray, head: int, heads: int) -> np.ndarray:
    """Replace one head's slice of [..., heads * width] by the mean of the other heads."""
    split = x.reshape(*x.shape[:-1], heads, -1).copy()
    split[..., head, :] = np.delete(split, head, axis=-2).mean(axis=-2) if heads > 1 else 0
    return split.reshape(x.shape)


@pytest.mark.parametrize("heads", [2, 3, 12])
def test_the_mean_of_the_others(heads: int) -> None:
    x = draw(2, 5, heads, 4)
    means = [np.delete(x.numpy(), head, axis=-2).mean(axis=-2) for head in range(heads)]
    np.testing.assert_allclose(edits.mean_of_others(x), np.stack(means, axis=-2), atol=1e-6)


def test_a_single_head_is_replaced_by_zeros() -> None:
    x = draw(2, 3, 8)
    assert torch.equal(edits.replace_head_by_mean(x, 0, 1), torch.zeros(2, 3, 8))
    assert torch.equal(edits.mean_of_others(x.unflatten(-1, (1, 8))), torch.zeros(2, 3, 1, 8))


@pytest.mark.parametrize("head", range(3))
def test_replacing_one_head_changes_only_its_slice_at_every_position(head: int) -> None:
    x = draw(2, 5, 12)
    before = x.clone()
    edited = edits.replace_head_by_mean(x, head, 3)
    np.testing.assert_allclose(edited, numpy_replaced(x.numpy(), head, 3), atol=1e-6)
    outside = [i for i in range(12) if i // 4 != head]
    assert torch.equal(edited[..., outside], x[..., outside])
    assert torch.equal(x, before)


def test_replacing_heads_in_rows_replaces_one_head_per_row() -> None:
    x = draw(5, 4, 12)
    before = x.clone()
    rows, chosen = torch.tensor([4, 0, 2]), torch.tensor([1, 2, 1])
    edited = edits.replace_heads_by_mean_in_rows(x, rows, chosen, 3)
    expected = x.numpy().copy()
    for row, head in zip([4, 0, 2], [1, 2, 1], strict=True):
        expected[row] = numpy_replaced(expected[row], head, 3)
    np.testing.assert_allclose(edited, expected, atol=1e-6)
    assert torch.equal(edited[[1, 3]], x[[1, 3]])
    assert torch.equal(x, before)


def test_several_heads_of_one_row_can_be_replaced() -> None:
    x = draw(1, 4, 12)
    edited = edits.replace_heads_by_mean_in_rows(x, torch.tensor([0, 0]), torch.tensor([0, 2]), 3)
    expected = x.numpy().copy()
    expected[..., :4] = numpy_replaced(x.numpy(), 0, 3)[..., :4]
    expected[..., 8:] = numpy_replaced(x.numpy(), 2, 3)[..., 8:]
    np.testing.assert_allclose(edited, expected, atol=1e-6)


def test_zeroing_heads_and_neurons_in_rows() -> None:
    x = draw(5, 4, 12)
    before = x.clone()
    rows, chosen = torch.tensor([4, 0, 2]), torch.tensor([1, 2, 1])
    heads, neurons = x.numpy().copy(), x.numpy().copy()
    for row, site in zip([4, 0, 2], [1, 2, 1], strict=True):
        heads[row, :, 4 * site : 4 * site + 4] = 0
        neurons[row, :, site] = 0
    np.testing.assert_array_equal(edits.zero_heads_in_rows(x, rows, chosen, 3), heads)
    np.testing.assert_array_equal(edits.zero_neurons_in_rows(x, rows, chosen), neurons)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaling_keeps_the_dtype(dtype: torch.dtype) -> None:
    x, scales = draw(2, 3, 6, dtype=dtype), torch.tensor([1.0, 0.0, 2.0, 0.5, -1.0, 1.0])
    scaled = edits.scale(x, scales)
    assert scaled.dtype == dtype
    np.testing.assert_array_equal(scaled.double(), x.double().numpy() * scales.numpy())


def test_a_scale_close_to_one_changes_most_numbers_in_bfloat16() -> None:
    x, scales = draw(1, 200, 6, dtype=torch.bfloat16), torch.full((6,), 1.003)
    scaled = edits.scale(x, scales)
    assert scales.bfloat16().eq(1).all()
    assert torch.equal(scaled, (x.double() * 1.003).to(torch.bfloat16))
    assert float((scaled != x).float().mean()) > 0.5


def test_patching_copies_clean_activations_to_the_chosen_positions_only() -> None:
    x, clean = draw(2, 6, 4), draw(2, 6, 4) + 9
    before = x.clone()
    patched = edits.patch_positions(x, clean, torch.tensor([1, 5]))
    expected = x.numpy().copy()
    expected[:, [1, 5]] = clean.numpy()[:, [1, 5]]
    np.testing.assert_array_equal(patched, expected)
    assert torch.equal(x, before)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    x = draw(2, 3, 12)
    wrong = [
        lambda: edits.scale(x, torch.ones(11)),
        lambda: edits.scale(x, torch.ones(2, 12)),
        lambda: edits.scale(x.long(), torch.ones(12)),
        lambda: edits.patch_positions(x, draw(2, 3, 11), torch.tensor([0])),
        lambda: edits.patch_positions(x, x, torch.tensor([0.0])),
        lambda: edits.replace_heads_by_mean_in_rows(x[0], torch.tensor([0]), torch.tensor([0]), 3),
        lambda: edits.replace_heads_by_mean_in_rows(x, torch.tensor([0, 1]), torch.tensor([0]), 3),
        lambda: edits.zero_heads_in_rows(x, torch.tensor([0.0]), torch.tensor([0]), 3),
        lambda: edits.zero_neurons_in_rows(x, torch.tensor([0]), torch.tensor([0, 1])),
    ]
    for call in wrong:
        with pytest.raises(TypeCheckError):
            call()
    with pytest.raises(RuntimeError, match="unflatten"):
        edits.replace_head_by_mean(x, 0, 5)  # 12 features are not 5 heads
