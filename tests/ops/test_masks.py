"""Which keys a query may see."""

import pytest
import torch

from inhibitor.ops import masks
from tests.ops.cases import MASKS, Case, mask

CPU = torch.device("cpu")
LENGTHS = [(0, 0), (0, 3), (3, 0), (1, 1), (4, 4), (3, 5), (5, 3)]


def test_causal_is_aligned_to_the_top_left():
    assert masks.dense(None, True, 2, 3, CPU)[0, 0].tolist() == [[True, False, False], [True, True, False]]


def test_without_any_rule_all_is_seen():
    allowed = masks.dense(None, False, 2, 3, CPU)
    assert allowed.shape == (1, 1, 2, 3)
    assert allowed.all()


def test_dense_is_the_mask_and_the_causal_rule():
    padding = torch.tensor([[True, False, True], [False, True, True]])[:, None, None, :]
    allowed = masks.dense(padding, True, 3, 3, CPU)
    assert allowed[0, 0].tolist() == [[True, False, False], [True, False, False], [True, False, True]]
    assert allowed[1, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", MASKS)
def test_count_is_the_sum_of_dense(kind, is_causal, queries, keys):
    given = mask(Case(2, 3, 3, queries, keys, 1, 1, mask=kind), torch.Generator().manual_seed(0))
    if given is not None:  # as inhibitor_attention hands it on: four dimensions, the keys in full
        given = given.reshape((1,) * (4 - given.dim()) + tuple(given.shape)).expand(-1, -1, -1, keys)
    count = masks.count(given, is_causal, queries, keys, CPU)
    shape = (2, 3, queries, 1)
    allowed = masks.dense(given, is_causal, queries, keys, CPU).expand(2, 3, queries, keys)
    assert not count.is_floating_point()
    assert torch.equal(count.broadcast_to(shape), allowed.sum(-1, keepdim=True))


def test_counting_under_a_padding_mask_makes_no_square(monkeypatch):
    def square(*_):
        raise AssertionError("queries × keys")

    padding = torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = masks.dense(padding, True, 40, 50, CPU).sum(-1, keepdim=True)
    monkeypatch.setattr(masks, "dense", square)
    assert torch.equal(masks.count(padding, True, 40, 50, CPU), expected)
