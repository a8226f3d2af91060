"""The reservoir: every sample has the same chance, equal seeds give equal buffers, a restart changes nothing."""

import numpy as np
import pytest
import torch

from lightcl.data.tasks import Batch
from lightcl.methods.parts.reservoir import ReplayParameters, Reservoir
from tests.lightcl import toys

CONTEXT = toys.context(0, [0, 1])
SAMPLES = CONTEXT.task.train


def offer(reservoir: Reservoir, batches: int, start: int = 0, logits: bool = False) -> Reservoir:
    """Batches of 4 whose labels count up, so that a label says which sample it is."""
    for number in range(start, start + batches):
        labels = torch.arange(4 * number, 4 * number + 4)
        images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        reservoir.offer(Batch(images, labels), SAMPLES, CONTEXT, labels.float()[:, None] if logits else None)
    return reservoir


def test_the_first_samples_fill_it_in_order():
    reservoir = offer(Reservoir(6), 1)
    assert (len(reservoir), reservoir.rows["labels"].tolist()) == (4, [0, 1, 2, 3])
    offer(reservoir, 1, start=1)
    assert len(reservoir) == 6
    assert reservoir.seen == 8


def test_rows_belong_together():
    reservoir = offer(Reservoir(5), 20, logits=True)
    labels = reservoir.rows["labels"]
    assert len(set(labels.tolist())) == 5
    assert torch.equal(reservoir.rows["logits"][:, 0], labels.float())
    assert torch.equal(reservoir.rows["images"][:, 0, 0, 0], labels.to(torch.uint8))
    assert reservoir.rows["images"].dtype == torch.uint8
    assert reservoir.rows["tasks"].tolist() == [0] * 5


def test_a_full_buffer_stays_where_it_is():
    """A copy of the buffer in every step would cost time and memory in proportion to its size."""
    reservoir = offer(Reservoir(6), 2, logits=True)
    places = {name: rows.data_ptr() for name, rows in reservoir.rows.items()}
    labels = reservoir.rows["labels"].tolist()
    offer(reservoir, 5, start=2, logits=True)
    assert reservoir.rows["labels"].tolist() != labels
    assert {name: rows.data_ptr() for name, rows in reservoir.rows.items()} == places


def test_a_restored_buffer_does_not_write_into_shared_tensors():
    first, restored = offer(Reservoir(6), 2), Reservoir(6)
    restored.load_state_dict(first.state_dict())
    before = toys.copy_of(first.state_dict())
    offer(restored, 5, start=2)
    toys.assert_same(first.state_dict(), before)


def test_every_sample_has_the_same_chance_to_stay():
    """40 samples, 10 rows, 800 seeds: each is expected 200 times, with a deviation of sqrt(800·¼·¾) = 12.2."""
    kept = np.zeros(40)
    for seed in range(800):
        reservoir, rows = Reservoir(10), {}
        for _ in range(10):
            rows |= {row: reservoir.seen + position for row, position in reservoir.places(4, seed).items()}
            reservoir.seen += 4
        kept[list(rows.values())] += 1
    assert kept.sum() == 800 * 10
    assert abs(kept - 200).max() < 4.5 * 12.2
    # The mean of first and last quarter: a reservoir that favors old or new samples fails here.
    assert abs(kept[:10].mean() - kept[-10:].mean()) < 20


def test_other_seeds_keep_other_samples():
    first, second = ([Reservoir(3).places(20, seed)] for seed in (1, 2))
    assert first != second
    assert first == [Reservoir(3).places(20, 1)]


def test_images_are_kept_as_they_are_in_the_data():
    """The batch holds augmented ones; `members` says which samples they are, of a selection where there is one."""
    chosen = SAMPLES.only(np.array([7, 9, 11]))
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([1, 1]), torch.tensor([2, 0]))
    reservoir = Reservoir(5)
    reservoir.offer(batch, chosen, CONTEXT)
    assert torch.equal(reservoir.rows["images"], SAMPLES.load(np.array([11, 7])).images)


def test_draws_are_without_replacement_and_differ():
    reservoir = offer(Reservoir(8), 5)
    first, second = reservoir.draw(4, CONTEXT), reservoir.draw(4, CONTEXT)
    assert len(set(first.labels.tolist())) == 4
    assert set(first.labels.tolist()) <= set(reservoir.rows["labels"].tolist())
    assert first.labels.tolist() != second.labels.tolist()
    assert len(reservoir.draw(100, CONTEXT).labels) == 8


@pytest.mark.parametrize("logits", [False, True])
def test_a_restored_reservoir_continues_with_the_same_numbers(logits):
    straight, first = offer(Reservoir(5), 6, logits=logits), offer(Reservoir(5), 6, logits=logits)
    for one in (straight, first):
        one.draw(3, CONTEXT)
    restored = Reservoir(5)
    restored.load_state_dict(toys.copy_of(first.state_dict()))
    for one in (straight, restored):
        offer(one, 6, start=6, logits=logits)
    toys.assert_same(restored.state_dict(), straight.state_dict())
    given, expected = restored.draw(3, CONTEXT), straight.draw(3, CONTEXT)
    assert torch.equal(given.images, expected.images)
    assert torch.equal(given.labels, expected.labels)


def test_an_empty_reservoir_can_be_restored():
    restored = Reservoir(5)
    restored.load_state_dict(Reservoir(5).state_dict())
    assert len(restored) == 0


@pytest.mark.parametrize(("keys", "drawn"), [({}, 15), ({"minibatch_size": 4}, 4), ({"minibatch_size": 40}, 15)])
def test_a_draw_is_the_entire_buffer_by_default(keys, drawn):
    parameters = ReplayParameters(name="any", **keys)
    assert (parameters.buffer_size, parameters.drawn, parameters.loss_classes) == (15, drawn, "all")
