"""Vital channels and the regularization term: numbers by hand, and the literal reference."""

import pytest
import torch

from lightcl.methods.parts.feature_memory import (
    Drift,
    channel_importance,
    logit_drift,
    vital_channels,
    vital_patterns,
)
from tests.reference import regularization as reference


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_importance_by_hand():
    # channel 0: |1| + |-2| (sample 0) + |0| + |4| (sample 1) = 7; channel 1: 3 + 0.5 + 1 + 1 = 5.5
    feature_map = torch.tensor([[[[1.0, -2.0]], [[3.0, 0.5]]], [[[0.0, 4.0]], [[-1.0, -1.0]]]])
    assert channel_importance(feature_map).tolist() == [7.0, 5.5]


def test_importance_is_summed_in_fp32_under_bf16():
    # 1000 ones would stick at 256 in bf16
    assert channel_importance(torch.ones(10, 1, 10, 10, dtype=torch.bfloat16)).tolist() == [1000.0]


def test_importance_agrees_with_the_reference():
    feature_map = random(3, 5, 2, 4)
    expected = torch.tensor(reference.channel_importance(feature_map.tolist()))
    torch.testing.assert_close(channel_importance(feature_map), expected)


TEN = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 9.0, 8.0, 7.0, 6.0])


@pytest.mark.parametrize(
    ("selection", "ratio", "vital"),
    [
        # keep = int(10 * 0.15 + 0.5) = 2: the two largest are 9 and 8
        ("exact", 0.15, {6, 7}),
        # the (10 - 2)-th smallest of 0..9 is 7; at or above it lie three: one more than keep
        ("paper", 0.15, {6, 7, 8}),
        # keep = int(10 * 0.04 + 0.5) = 0: exact marks at least one; the paper's threshold is the 10th smallest, 9
        ("exact", 0.04, {6}),
        ("paper", 0.04, {6}),
        # keep = 9: the paper's threshold is the max(1, 1)-th smallest, 0: all ten
        ("exact", 0.9, {6, 7, 8, 9, 0, 2, 4, 3, 1}),
        ("paper", 0.9, set(range(10))),
        ("exact", 1.0, set(range(10))),
        ("paper", 1.0, set(range(10))),
    ],
)
def test_vital_channels_by_hand(selection, ratio, vital):
    mask = vital_channels(TEN, ratio, selection)
    assert mask.dtype == torch.bool
    assert set(mask.nonzero().flatten().tolist()) == vital


@pytest.mark.parametrize(("channels", "keep"), [(512, 77), (160, 24), (32, 5)])  # int(C * 0.15 + 0.5)
def test_papers_selection_marks_one_channel_more_than_keep(channels, keep):
    importance = random(channels).abs()
    assert int(vital_channels(importance, 0.15, "exact").sum()) == keep
    assert int(vital_channels(importance, 0.15, "paper").sum()) == keep + 1


def test_equally_important_channels():
    importance = torch.tensor([1.0, 2.0, 2.0, 2.0])
    # keep = int(4 * 0.25 + 0.5) = 1. Exact: the lower index. Paper: the 3rd smallest is 2, so all three twos.
    assert vital_channels(importance, 0.25, "exact").tolist() == [False, True, False, False]
    assert vital_channels(importance, 0.25, "paper").tolist() == [False, True, True, True]


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("channels", [1, 2, 7, 40])
def test_vital_channels_agree_with_the_reference(channels, ratio):
    importance = random(channels, seed=channels).abs().mul(4).round()  # rounded: with ties
    exact = reference.vital_exactly(importance.tolist(), ratio)
    paper = reference.vital_as_in_the_paper(importance.tolist(), ratio)
    assert vital_channels(importance, ratio, "exact").tolist() == exact
    assert vital_channels(importance, ratio, "paper").tolist() == paper


MAPS = {"a": torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), "b": torch.tensor([[[[2.0]]]])}
STORED = {"a": torch.tensor([[[[1.0, 1.0]]]]), "b": torch.tensor([[[[5.0]]]])}  # of vital channels alone
VITAL = {"a": torch.tensor([False, True]), "b": torch.tensor([True])}


def drift(maps, stored, vital, reduction):
    """The scalar after these maps have come, one after the other."""
    moving = Drift(stored, vital, reduction)
    for name in vital:
        moving.on_map(name, maps[name])
    return moving.total()


def test_drift_by_hand():
    # a, channel 1: (3-1)² + (4-1)² = 13, its pattern 1² + 1² = 2; b: (2-5)² = 9, its pattern 25
    assert drift(MAPS, STORED, VITAL, "sum").item() == 22.0  # 13 + 9
    assert drift(MAPS, STORED, VITAL, "relative").item() == pytest.approx(3.43)  # (13/2 + 9/25) / 2


def test_logit_drift_by_hand():
    logits, stored = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert logit_drift(logits, stored, "sum").item() == 5.0  # 1² + 2²
    assert logit_drift(logits, stored, "relative").item() == 0.3125  # 5 / 16


@pytest.mark.parametrize("reduction", ["sum", "relative"])
def test_regularization_agrees_with_the_reference(reduction):
    maps = {"one": random(3, 6, 2, 2, seed=1), "two": random(3, 4, 1, 3, seed=2)}
    stored = {"one": random(3, 6, 2, 2, seed=3), "two": random(3, 4, 1, 3, seed=4)}
    vital = {"one": random(6, seed=5) > 0, "two": torch.tensor([True, False, False, True])}
    logits, stored_logits = random(3, 5, seed=6), random(3, 5, seed=7)
    fast = drift(maps, vital_patterns(stored, vital), vital, reduction) + logit_drift(logits, stored_logits, reduction)
    literal = reference.regularization(
        {name: m.tolist() for name, m in maps.items()},
        {name: m.tolist() for name, m in stored.items()},
        {name: m.tolist() for name, m in vital.items()},
        logits.tolist(),
        stored_logits.tolist(),
        reduction,
    )
    assert fast.item() == pytest.approx(literal, rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "relative"])
def test_only_vital_channels_are_regularized(reduction):
    now = MAPS["a"].clone().requires_grad_(True)
    drift({"a": now}, STORED, {"a": VITAL["a"]}, reduction).backward()
    # d/dx of (x - x*)²: 2(3-1) = 4 and 2(4-1) = 6, over the pattern's 2 under "relative"
    scale = 1.0 if reduction == "sum" else 0.5
    assert now.grad.tolist() == [[[[0.0, 0.0]], [[4.0 * scale, 6.0 * scale]]]]


def test_patterns_are_the_vital_channels():
    assert {n: p.tolist() for n, p in vital_patterns(MAPS, VITAL).items()} == {"a": [[[[3.0, 4.0]]]], "b": [[[[2.0]]]]}


@pytest.mark.parametrize("reduction", ["sum", "relative"])
def test_no_regularized_map_means_no_drift(reduction):
    assert drift({}, {}, {}, reduction).item() == 0.0


def test_relative_drift_from_a_silent_pattern_stays_finite():
    silent = {"b": torch.zeros(1, 1, 1, 1)}
    assert torch.isfinite(drift(MAPS, silent, {"b": VITAL["b"]}, "relative"))
