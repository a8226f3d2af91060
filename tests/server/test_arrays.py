import pickle

import numpy as np
from flwr.app import Array

from server.arrays import PlainArray, plain_record

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_nothing_is_encoded_between_two_who_ask_for_values() -> None:
    assert PlainArray(VALUES).numpy() is VALUES


def test_whoever_sends_it_gets_what_flower_would_have_sent() -> None:
    plain, flowers = PlainArray(VALUES), Array(VALUES)
    assert (plain.dtype, plain.shape, plain.stype, plain.data) == (
        flowers.dtype,
        flowers.shape,
        flowers.stype,
        flowers.data,
    )
    assert plain.object_id == flowers.object_id
    assert plain.deflate() == flowers.deflate()


def test_it_travels_to_another_process() -> None:
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(PlainArray(VALUES), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1, "its values are not copied into the text"
    assert np.array_equal(pickle.loads(text, buffers=buffers).numpy(), VALUES)  # noqa: S301 our own text


def test_a_record_keeps_it() -> None:
    assert plain_record({"a": VALUES})["a"].numpy() is VALUES
