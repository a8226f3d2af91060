import numpy as np
from flwr.app import Array, ArrayRecord

from simulations.runtime.decoded import DecodedArray


def test_it_is_decoded_once() -> None:
    plain = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    once = DecodedArray(plain)
    assert once.numpy() is once.numpy()
    assert np.array_equal(once.numpy(), plain.numpy())


def test_a_record_keeps_it() -> None:
    """Flower's constructor of a record copies the arrays; `update` does not."""
    once = DecodedArray(Array(np.zeros(3)))
    record = ArrayRecord()
    record.update({"a": once})
    assert record["a"] is once
