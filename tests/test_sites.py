"""Selecting sites: ties by (layer, site), counts, and random banks that match a bank layer by layer."""

import numpy as np
import pytest
import torch

from hones_eval.core.sites import Head, Neuron, matched_random, neuron_count, top_heads, top_neurons
from hones_eval.errors import HonesError


def test_the_highest_come_first_and_ties_go_to_the_lower_layer_then_site() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0], [2.0, -1.0, 3.0]])
    assert top_heads(scores, 6) == [(1, 2), (0, 1), (1, 0), (0, 0), (0, 2), (1, 1)]
    assert top_heads(scores, 2) == [Head(1, 2), Head(0, 1)]
    assert top_neurons(scores, 1) == [Neuron(1, 2)]


def test_ties_compared_with_numpy() -> None:
    scores = torch.randint(-2, 3, (7, 40), generator=torch.Generator().manual_seed(0)).float()
    layer, site = np.indices(scores.shape)
    order = np.lexsort((site.ravel(), layer.ravel(), -scores.numpy().ravel()))
    expected = [divmod(int(i), 40) for i in order]
    assert [tuple(neuron) for neuron in top_neurons(scores, 280)] == expected
    assert [tuple(head) for head in top_heads(scores, 33)] == expected[:33]


@pytest.mark.parametrize("count", [0, -1, 7])
def test_an_impossible_number_of_sites_is_refused(count: int) -> None:
    with pytest.raises(HonesError, match=f"cannot choose {count} of 6 heads: ask for 1 to 6"):
        top_heads(torch.zeros(2, 3), count)


def test_scores_must_be_a_matrix() -> None:
    with pytest.raises(HonesError, match=r"\[layers, heads\], but have the shape \(6,\)"):
        top_heads(torch.zeros(6), 1)


@pytest.mark.parametrize(
    ("layers", "width", "fraction", "count"),
    [(32, 11008, 0.01, 3523), (28, 18944, 0.01, 5304), (2, 3, 0.01, 1), (2, 3, 1.0, 6), (3, 100, 0.5, 150)],
)
def test_the_neuron_count_is_a_share_of_all_layers_together(
    layers: int, width: int, fraction: float, count: int
) -> None:
    assert neuron_count(torch.zeros(layers, width), fraction) == count


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_a_share_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(HonesError, match="must lie above 0 and at most 1"):
        neuron_count(torch.zeros(2, 3), fraction)


def test_a_random_bank_has_as_many_neurons_in_each_layer_and_none_of_the_bank() -> None:
    bank = [Neuron(0, 3), Neuron(0, 7), Neuron(4, 0), Neuron(4, 1), Neuron(4, 2)]
    banks = [matched_random(bank, 50, seed) for seed in range(40)]
    for drawn in banks:
        assert [neuron.layer for neuron in drawn] == [0, 0, 4, 4, 4]
        assert len(set(drawn)) == 5
        assert not set(drawn) & set(bank)
        assert all(0 <= neuron.neuron < 50 for neuron in drawn)
    assert matched_random(bank, 50, 3) == banks[3]
    assert len({tuple(drawn) for drawn in banks}) > 35
    drawn_in_layer_4 = {neuron.neuron for drawn in banks for neuron in drawn if neuron.layer == 4}
    assert len(drawn_in_layer_4) > 35  # of the 47 that are not in the bank


def test_a_random_bank_of_most_of_a_layer_is_drawn_from_the_whole_layer() -> None:
    bank = [Neuron(1, i) for i in range(4)]
    drawn = matched_random(bank, 6, 0)
    assert len(set(drawn)) == 4
    assert all(neuron.layer == 1 and neuron.neuron < 6 for neuron in drawn)
