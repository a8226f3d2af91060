"""Files of tensors: safetensors reads what we write, we read what safetensors writes, and nothing else is taken."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightcl.storage.tensor_file import TYPES, TensorFile, read_bytes, read_tensors, tensors_in, write_tensors

TENSORS = {
    "weights": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a flag": torch.tensor([True, False, True]),
    "one number": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor([7]),
}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    value = write_tensors(tmp_path / "t", TENSORS)
    assert value == zlib.crc32((tmp_path / "t").read_bytes())
    assert equal(load_file(tmp_path / "t"), TENSORS)


def test_we_read_what_safetensors_writes_in_the_order_of_names(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t", metadata={"made": "elsewhere"})
    found = tensors_in(read_bytes(tmp_path / "t"))
    assert equal(found, TENSORS)
    assert list(found) == sorted(TENSORS)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_every_type_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"t": torch.tensor([[0, 1], [1, 1]]).to(dtype)}
    write_tensors(tmp_path / "t", tensors)
    found, theirs = tensors_in(read_bytes(tmp_path / "t"))["t"], load_file(tmp_path / "t")["t"]
    assert found.dtype == theirs.dtype == dtype
    assert (
        found.view(torch.uint8).tolist() == theirs.view(torch.uint8).tolist() == tensors["t"].view(torch.uint8).tolist()
    )


def test_tensors_that_no_file_can_hold_are_refused_before_it_is_written(tmp_path: Path) -> None:
    whole = torch.zeros(8)
    with pytest.raises(ValueError, match="the tensors a and b share memory"):
        write_tensors(tmp_path / "t", {"b": whole[3:], "c": torch.zeros(1), "a": whole[:4]})
    with pytest.raises(ValueError, match=r"the tensor a holds torch\.complex128"):
        write_tensors(tmp_path / "t", {"a": torch.zeros(2, dtype=torch.complex128)})
    assert not (tmp_path / "t").exists()
    write_tensors(tmp_path / "t", {"a": whole[:4], "b": whole[4:], "c": whole[:0]})


def test_some_tensors_are_read_and_no_others(tmp_path: Path) -> None:
    tensors = {name: torch.full((1000,), float(number)) for number, name in enumerate("abcdef")}
    write_tensors(tmp_path / "t", tensors)
    found = read_tensors(tmp_path / "t", ["d", "c"])
    assert equal(found, {name: tensors[name] for name in "cd"})
    assert found["c"].untyped_storage().nbytes() <= 8000
    with pytest.raises(ValueError, match="'g'"):
        read_tensors(tmp_path / "t", ["a", "g"])


@pytest.mark.parametrize("size", [0, 5, 8, 20, 300, 2000])
def test_some_tensors_of_a_file_that_was_cut_short_are_refused(tmp_path: Path, size: int) -> None:
    write_tensors(tmp_path / "t", {"a": torch.zeros(1000), "b": torch.zeros(1000)})
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:size])
    with pytest.raises(ValueError):  # noqa: PT011 of any text
        read_tensors(tmp_path / "t", ["b"])


def file_of(header: str, content: bytes = bytes(16)) -> np.ndarray:
    return np.frombuffer(struct.pack("<Q", len(header)) + header.encode() + content, dtype=np.uint8).copy()


def entry(dtype: str = "F32", shape: str = "[4]", offsets: str = "[0, 16]") -> str:
    return f'{{"t": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}'


def test_the_file_of_the_next_tests_can_be_read() -> None:
    assert torch.equal(tensors_in(file_of(entry()))["t"], torch.zeros(4))


@pytest.mark.parametrize(
    "header",
    [
        "", "[]", "1", '{"t": 1}', '{"t": {}}', "\xff", entry()[:-1], entry(dtype="F31"), entry(shape="[5]"),
        entry(shape="[-4]"), entry(shape="[-1]"), entry(shape="4"), entry(shape='["4"]'),
        entry(offsets="[0, 17]"), entry(offsets="[0, 20]"),
        entry(offsets="[-16, 0]"), entry(offsets="[16, 0]"), entry(offsets="[0]"), entry(offsets="[0, 1e400]"),
        entry(shape="[9223372036854775807, 9223372036854775807]"), "[" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused(header: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 of any text
        tensors_in(file_of(header))


@pytest.mark.parametrize("size", range(0, 24, 3))
def test_a_file_that_was_cut_short_is_refused(size: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 of any text
        tensors_in(file_of(entry())[:size])


def test_a_file_travels_as_its_path_and_is_read_once(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", TENSORS)
    sent = TensorFile(tmp_path / "t", ["weights", "count"])
    assert torch.equal(sent.tensors["weights"], TENSORS["weights"])
    text = pickle.dumps(sent)
    assert len(text) < 300
    arrived = pickle.loads(text)  # noqa: S301 our own text
    assert torch.equal(arrived.tensors["weights"], TENSORS["weights"])
    (tmp_path / "t").unlink()
    assert arrived.tensors is arrived.tensors
    with pytest.raises(FileNotFoundError):
        pickle.loads(text).tensors  # noqa: B018, S301
