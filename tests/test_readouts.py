"""The pure readouts compared with numpy, and the shapes they accept."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from hones_eval.core import readouts


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def probabilities(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_probability_of_a_sequence_is_the_sum_over_its_tokens(dtype: torch.dtype) -> None:
    logits, target = draw(3, 4, 50, dtype=dtype), torch.tensor([7, 7, 0, 49])
    found = readouts.sequence_log_probability(logits, target)
    p = probabilities(logits)
    expected = [sum(np.log(p[row, step, token]) for step, token in enumerate(target)) for row in range(3)]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_log_probability_does_not_overflow_with_large_logits() -> None:
    logits = torch.zeros(1, 1, 3)
    logits[0, 0, 0] = 1e4
    assert readouts.sequence_log_probability(logits, torch.tensor([1])).item() == -1e4


def test_the_probability_of_an_answer_is_the_sum_over_its_ids() -> None:
    logits, ids = draw(5, 30, dtype=torch.bfloat16), torch.tensor([3, 29, 11])
    found = readouts.answer_probability(logits, ids)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, probabilities(logits)[:, ids].sum(-1), rtol=1e-5)


def test_the_logit_difference_is_a_difference_of_means() -> None:
    logits = draw(4, 20)
    found = readouts.logit_difference(logits, torch.tensor([1, 2]), torch.tensor([5, 9, 13]))
    x = logits.double().numpy()
    np.testing.assert_allclose(found, x[:, [1, 2]].mean(-1) - x[:, [5, 9, 13]].mean(-1), rtol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.5]])
def test_the_direction_of_a_target_is_a_weighted_sum_that_counts_repeats(
    weights: list[float] | None,
) -> None:
    unembedding, ids = draw(12, 6), [4, 9, 4]
    rows = unembedding.double().numpy()[ids] * np.array(weights or [1.0, 1.0, 1.0])[:, None]
    expected = rows.sum(0) / np.linalg.norm(rows.sum(0))
    np.testing.assert_allclose(readouts.target_direction(unembedding, ids, weights), expected, atol=1e-6)


def test_a_target_without_a_direction_is_refused() -> None:
    unembedding = draw(5, 6)
    unembedding[2] = -unembedding[1]
    with pytest.raises(ValueError, match="add up to zero"):
        readouts.target_direction(unembedding, [1, 2])


def test_the_write_in_contribution_is_activation_times_gain() -> None:
    down, direction, z = draw(6, 9), draw(6), draw(2, 3, 9, dtype=torch.bfloat16)
    gain = readouts.write_gain(down, direction)
    expected = np.array([down.double().numpy()[:, i] @ direction.double().numpy() for i in range(9)])
    np.testing.assert_allclose(gain, expected, rtol=1e-5, atol=1e-5)
    found = readouts.write_in(z, gain)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, z.double().numpy() * gain.double().numpy(), rtol=1e-6)


def test_the_margin_of_a_target_is_relative_to_the_best_other_token() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 1.5]])
    assert float(readouts.target_margin(logits, torch.tensor([1, 2]))) == (5.0 - 2.0) + (1.5 - 4.0)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    wrong = [
        lambda: readouts.sequence_log_probability(draw(3, 4, 9), torch.tensor([1, 2])),
        lambda: readouts.sequence_log_probability(draw(4, 9), torch.tensor([1, 2, 3, 4])),
        lambda: readouts.answer_probability(draw(2, 3, 9), torch.tensor([1])),
        lambda: readouts.answer_probability(draw(3, 9), torch.tensor([0.5])),
        lambda: readouts.logit_difference(draw(9), torch.tensor([1]), torch.tensor([2])),
        lambda: readouts.write_gain(draw(6, 9), draw(9)),
        lambda: readouts.write_in(draw(2, 8), draw(9)),
        lambda: readouts.target_direction(draw(9), [1]),
    ]
    for call in wrong:
        with pytest.raises(TypeCheckError):
            call()
