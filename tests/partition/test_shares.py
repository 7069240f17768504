"""Channels in proportion to weights, by largest remainders."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disco.partition.shares import Shares, share_out
from disco_kernels import Ownership

weights = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3)


@given(st.integers(0, 300), weights)
def test_counts_are_the_quotas_rounded(channels: int, given_weights: list[float]) -> None:
    owned = share_out(channels, given_weights)
    assert owned.is_contiguous and owned.num_channels == channels
    total = sum(given_weights)
    for count, weight in zip(owned.counts, given_weights, strict=True):
        assert abs(count - channels * weight / total) < 1 + 1e-9
        assert weight > 0 or count == 0 or channels == 0


@given(st.integers(0, 300), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_equal_weights_are_equal_shares(channels: int, nodes: int, weight: float) -> None:
    assert share_out(channels, (weight,) * nodes) == Ownership.contiguous(channels, nodes)


def test_by_hand() -> None:
    assert share_out(10, (2.0, 1.0, 1.0)).counts == (5, 3, 2)
    assert share_out(7, (20.0, 10.0, 5.0)).counts == (4, 2, 1)
    assert share_out(3, (100.0, 1.0)).counts == (3, 0)
    assert share_out(4, (0.0, 1.0)).channels == ((), (0, 1, 2, 3))


def test_a_layer_may_have_shares_of_its_own() -> None:
    shares = Shares((1.0, 1.0), {"a": (3.0, 1.0)})
    assert shares.of("a") == (3.0, 1.0) and shares.of("b") == (1.0, 1.0)
    assert Shares.equal(2) == Shares((1.0, 1.0))
