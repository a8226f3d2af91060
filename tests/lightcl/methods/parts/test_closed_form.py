"""The streaming discriminant analysis: by hand, against the textbook, and added up over tasks and devices."""

import numpy as np
import pytest
import torch

from lightcl.methods.parts.closed_form import (
    LinearHead,
    Statistics,
    discriminant_head,
    from_upper_triangle,
    statistics_bytes,
)
from tests.reference.discriminant import discriminant_scores


def drawn(count: int = 90, features: int = 6, classes: int = 3, seed: int = 0):
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = draw.normal(0, 2, (classes, features))
    return torch.from_numpy(centers[labels] + draw.normal(0, 1, (count, features))), torch.from_numpy(labels)


def sums(features, labels, classes: int) -> Statistics:
    found = Statistics.zeros(classes, features.shape[1])
    found.add_(features, labels)
    return found


def test_sums_by_hand():
    found = sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 2, 0]), classes=3)
    assert found.count.tolist() == [2, 0, 1]
    assert found.total.tolist() == [[6, 8], [0, 0], [3, 4]]
    assert found.gram.tolist() == [1 + 9 + 25, 2 + 12 + 30, 4 + 16 + 36]


def test_head_by_hand():
    """Two classes at -1 and +1 with a within-class variance of 1: log p(1) - log p(0) = 2x."""
    features = torch.tensor([[-2.0], [0.0], [0.0], [2.0]])
    head = discriminant_head(sums(features, torch.tensor([0, 0, 1, 1]), 2), shrinkage=1e-12)
    scores = head.log_posteriors(torch.tensor([[0.5], [-1.0]]))
    assert (scores[:, 1] - scores[:, 0]).tolist() == pytest.approx([1.0, -2.0])


def test_shrinkage_by_hand():
    """The same with a shrinkage of 1: the variance is 1 + 1, so the difference is halved."""
    features = torch.tensor([[-2.0], [0.0], [0.0], [2.0]])
    head = discriminant_head(sums(features, torch.tensor([0, 0, 1, 1]), 2), shrinkage=1.0)
    scores = head.log_posteriors(torch.tensor([[0.5]]))
    assert float(scores[0, 1] - scores[0, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize("shrinkage", [1e-4, 0.01, 0.5])
def test_head_is_the_textbooks(shrinkage):
    features, labels = drawn()
    head = discriminant_head(sums(features, labels, 3), shrinkage)
    expected = discriminant_scores(features.numpy(), labels.numpy(), 3, shrinkage, features[:20].numpy())
    np.testing.assert_allclose(head.log_posteriors(features[:20].float()).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 5])
def test_summed_statistics_of_a_fleet_give_the_centralized_head(parts):
    """Whatever the split: here, unequal shares of which most lack a class."""
    features, labels = drawn(300, 12, 3)
    central = discriminant_head(sums(features, labels, 3), 0.01)
    order = np.argsort(labels.numpy(), kind="stable")
    cuts = np.sort(np.random.default_rng(1).choice(np.arange(1, 300), parts - 1, replace=False))
    summed = Statistics.zeros(3, 12)
    for members in np.split(order, cuts):
        part = sums(features[members], labels[members], 3).tensors()
        for name, tensor in summed.tensors().items():
            tensor += part[name]
    fleet = discriminant_head(summed, 0.01)
    for name, tensor in central.tensors().items():
        torch.testing.assert_close(fleet.tensors()[name], tensor, rtol=1e-6, atol=1e-6)


def test_unknown_classes_are_never_predicted():
    features, labels = drawn(classes=2)
    scores = discriminant_head(sums(features, labels, 4), 0.01).log_posteriors(features.float())
    assert scores[:, 2:].eq(float("-inf")).all()
    assert torch.allclose(scores[:, :2].exp().sum(1), torch.ones(len(scores)))


def test_without_samples_nothing_is_known_and_nothing_is_infinite():
    head = discriminant_head(Statistics.zeros(3, 5), 0.01)
    assert not head.known.any()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in head.tensors().values())


def test_constant_features_do_not_break_the_solution():
    features = torch.ones(6, 4)
    head = discriminant_head(sums(features, torch.tensor([0, 1, 0, 1, 0, 1]), 2), 0.01)
    assert torch.allclose(head.log_posteriors(features).exp(), torch.full((6, 2), 0.5))


@pytest.mark.parametrize("size", [1, 5, 32, 33, 70])
def test_the_packed_gram_matrix_equals_the_full_one(size):
    """Around the number of rows that are computed at a time."""
    features = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (9, size)))
    packed = sums(features, torch.zeros(9, dtype=torch.long), 1).gram
    assert packed.shape == (size * (size + 1) // 2,)
    torch.testing.assert_close(from_upper_triangle(packed, size), features.T @ features)


def test_bytes_are_those_of_the_tensors():
    statistics = Statistics.zeros(10, 7)
    head = discriminant_head(statistics, 0.1)
    held = [*statistics.tensors().values(), *head.tensors().values()]
    assert statistics_bytes(10, 7) == sum(t.numel() * t.element_size() for t in held)


def test_bf16_autocast_leaves_the_scores_alone():
    head = LinearHead(torch.tensor([[1.001], [0.0]]), torch.zeros(2), torch.ones(2))
    exact = head.log_posteriors(torch.tensor([[1.0]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.log_posteriors(torch.tensor([[1.0]])), exact)


def test_a_singular_covariance_is_regularized_further():
    """Three identical features, hardly any shrinkage."""
    features = torch.linspace(-1, 1, 12)[:, None].repeat(1, 3) * 1e3
    head = discriminant_head(sums(features, torch.arange(12) % 2, 2), 1e-30)
    assert torch.isfinite(head.weight).all()


def test_a_variance_that_rounding_made_negative_is_corrected():
    """Three samples at 1, and a Σ x² one rounding error below 3."""
    statistics = Statistics(*(torch.tensor(t, dtype=torch.float64) for t in ([3.0], [[3.0]], [np.nextafter(3.0, 0)])))
    head = discriminant_head(statistics, 1e-6)
    assert torch.isfinite(head.weight).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("gram", float("nan"), "not finite"), ("total", float("inf"), "not finite"), ("gram", 1e15, "inconsistent")],
)
def test_sums_of_no_samples_are_refused(name, value, message):
    features, labels = drawn()
    statistics = sums(features, labels, 3)
    statistics.tensors()[name].view(-1)[1] = value  # of the Gram matrix, beside the diagonal
    with pytest.raises(ValueError, match=message):
        discriminant_head(statistics, 0.01)
