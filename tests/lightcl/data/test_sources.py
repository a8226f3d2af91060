"""Sources of images: reading, caching, and refused inputs."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_digits

from lightcl.data import images as image_cache
from lightcl.data import sources
from lightcl.data.images import ImageSet, SourceRequest, iter_batches, split_off_test
from lightcl.data.partition import partition
from lightcl.data.section import Data
from lightcl.data.sources import decoding, load_source, register_source
from lightcl.data.sources.decoding import FORMATS, decode
from lightcl.data.sources.image_folder import IMAGE_SUFFIXES, _class_names, _image_files
from lightcl.data.sources.parquet import read_parquet
from lightcl.errors import RequestError
from tests.lightcl import toys
from tests.lightcl.data.odd_images import EPS, blank_png, fake_ghostscript, icon


def picture(value: int, size: int = 8, mode: str = "RGB") -> Image.Image:
    """A picture of one gray value with a ramp along its first row, so that turning it would show."""
    pixels = np.full((size, size), value, dtype=np.uint8)
    pixels[0] = np.arange(size)
    image = Image.fromarray(pixels)
    return image if mode == "L" else image.convert(mode)


def png(value: int, size: int = 8, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    picture(value, size, mode).save(stream, "PNG")
    return stream.getvalue()


def pixels(value: int, size: int = 8, mode: str = "RGB") -> np.ndarray:
    array = np.asarray(picture(value, size, mode))
    return array[..., None] if mode == "L" else array


def values_of(images: ImageSet) -> list[int]:
    """The gray value of each picture."""
    return [int(image[-1, -1, 0]) for image in images.images]


def write_parquet(
    file: Path, cells: list, labels: list, image_column: str = "image", label_column: str = "label"
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image_column: pa.array(cells), label_column: pa.array(labels)}), file)
    return file


def parquet(path: Path, **options) -> image_cache.Source:
    return load_source(SourceRequest("parquet", path, **options))


# -- images of unknown origin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "svg"])
def test_a_file_is_opened_as_a_raster_format_alone(tmp_path, monkeypatch, suffix):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    ghostscript = fake_ghostscript(tmp_path, monkeypatch)
    file = tmp_path / f"photo.{suffix}"
    file.write_bytes(EPS)
    for content in (str(file), EPS):
        with pytest.raises(RequestError, match=r"cup/photo: the image does not decode \(not an image, or an unknown"):
            decode(content, "cup/photo", 8)
    assert not ghostscript.exists()


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if s not in (".svg", ".psd", ".jxl", ".heic", ".heif")])
def test_the_formats_of_all_names_are_read(tmp_path, suffix):
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    picture(200, 32).convert(mode).save(tmp_path / f"photo{suffix}")
    content = (tmp_path / f"photo{suffix}").read_bytes()
    given = np.asarray(decode(content, "photo", None))
    assert given.shape[:2] == (32, 32)
    assert abs(int(given[-1, -1].max()) - (255 if mode == "1" else 200)) <= 2
    assert Image.registered_extensions()[suffix] in (*FORMATS, "MPO")


@pytest.mark.parametrize(
    "error", [struct.error("odd"), AssertionError(), MemoryError(), RuntimeError("odd"), KeyError(3)]
)
def test_whatever_a_decoder_raises_is_the_failure_of_this_file(monkeypatch, error):
    def load(self):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    text = re.escape(str(error) or type(error).__name__)
    with pytest.raises(RequestError, match=rf"cup/1.png: the image does not decode \({text}\)"):
        decode(png(10), "cup/1.png", None)


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_an_image_may_not_have_endless_pixels(monkeypatch):
    """A board has a gigabyte of memory, and 48 million pixels of one color fill 46 kilobytes."""
    large = blank_png(8000, 6000)
    assert len(large) < 300_000
    told = r"x.png: the image has 8000x6000 pixels, 48000000 in all \(allowed: up to 40000000\); make it smaller"
    with pytest.raises(RequestError, match=told):
        decode(large, "x.png", 32)
    with pytest.raises(RequestError, match=r"x.png: the image is too large \(allowed: up to 40000000 pixels\)"):
        decode(blank_png(20_000, 20_000)[:1000], "x.png", 32)  # Pillow's own limit
    monkeypatch.setattr(decoding, "MOST_PIXELS", 100)
    assert decode(blank_png(10, 10), "x.png", None).size == (10, 10)
    for content in (blank_png(10, 11), icon(blank_png(11, 11), 8)):
        with pytest.raises(RequestError, match="the image has 1"):
            decode(content, "x.png", None)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_an_image_is_resized_as_if_it_were_converted_first(mode):
    stream = io.BytesIO()
    random = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(random).convert("L").convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
    with Image.open(stream) as opened:
        literal = opened.convert("L" if mode in ("1", "L", "LA") else "RGB")
    expected = literal.resize((8, 8), Image.Resampling.BILINEAR)
    found = decode(stream.getvalue(), "x", 8)
    assert (found.mode, found.tobytes()) == (expected.mode, expected.tobytes())


# -- every source --------------------------------------------------------------------------------------------------


def test_digits_are_the_bundled_ones():
    source = load_source(SourceRequest("digits"))
    bunch = load_digits()
    assert len(source.train) + len(source.test) == 1797
    assert source.train.images.shape[1:] == (8, 8, 1)
    assert (source.channels, source.classes) == (1, tuple("0123456789"))
    counts = np.bincount(bunch.target)
    assert np.bincount(source.test.labels).tolist() == [round(n * 0.2) for n in counts.tolist()]
    known = {
        (np.round(image * (255 / 16)).astype(np.uint8).tobytes(), label)
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    for split in (source.train, source.test):
        assert {(image.tobytes(), label) for image, label in zip(split.images, split.labels, strict=True)} <= known
    assert source.train.images.max() == 255


def test_digits_in_another_size():
    source = load_source(SourceRequest("digits", image_size=16))
    assert source.train.images.shape[1:] == (16, 16, 1)


def write_idx(file: Path, array: np.ndarray) -> None:
    """The format of MNIST: two zero bytes, the type (8: bytes), the number of axes, their lengths, the values."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def fashion(root: Path, value: int) -> Path:
    raw = root / "FashionMNIST" / "raw"
    for split, labels in (("train", [3, 1, 4, 1]), ("t10k", [5, 9])):
        images = np.stack([pixels(value + label, 28, "L")[..., 0] for label in labels])
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.asarray(labels, dtype=np.uint8))
    return root


def test_fashion_mnist_from_a_local_copy(tmp_path):
    source = load_source(SourceRequest("fashion-mnist", fashion(tmp_path, 100), download=False))
    assert source.train.labels.tolist() == [3, 1, 4, 1]
    assert source.test.labels.tolist() == [5, 9]
    assert values_of(source.train) == [103, 101, 104, 101]
    assert source.train.images.shape == (4, 28, 28, 1)
    assert source.classes[9] == "Ankle boot"


def test_another_local_copy_is_another_source(tmp_path):
    first = load_source(SourceRequest("fashion-mnist", fashion(tmp_path / "a", 50), download=False))
    second = load_source(SourceRequest("fashion-mnist", fashion(tmp_path / "b", 60), download=False))
    assert values_of(first.train) == [53, 51, 54, 51]
    assert values_of(second.train) == [63, 61, 64, 61]


def test_fashion_mnist_in_another_size(tmp_path):
    source = load_source(SourceRequest("fashion-mnist", fashion(tmp_path, 10), image_size=14, download=False))
    assert source.train.images.shape == (4, 14, 14, 1)
    assert values_of(source.train) == [13, 11, 14, 11]


def test_cifar10_from_a_local_copy(tmp_path, monkeypatch):
    names = [f"class {i}" for i in range(10)]
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def batch(values: list[int]) -> dict:
        rows = np.stack([pixels(value, 32).transpose(2, 0, 1).reshape(-1) for value in values])
        return {"data": rows, "labels": [value % 10 for value in values]}

    for name, content in (
        ("one", batch([101, 102])),
        ("two", batch([103])),
        ("test", batch([214])),
        ("meta", {"label_names": names}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
    # torchvision checks the files of the real set; these are ours.
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [("one", None), ("two", None)])
    monkeypatch.setattr(kind, "test_list", [("test", None)])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    source = load_source(SourceRequest("cifar10", tmp_path, download=False))
    assert np.array_equal(source.train.images, np.stack([pixels(v, 32) for v in (101, 102, 103)]))
    assert source.train.labels.tolist() == [1, 2, 3]
    assert source.test.labels.tolist() == [4]
    assert source.classes == tuple(names)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_missing_local_copy_is_an_error_that_names_the_folder(tmp_path, name):
    with pytest.raises(
        RequestError,
        match=rf"data.source '{name}': not found under {tmp_path} .*; set data.download=true, or data.path to a folder "
        ".*data.source=parquet with data.path for a local copy",
    ) as refused:
        load_source(SourceRequest(name, tmp_path, download=False))
    assert "download=True" not in str(refused.value)


# -- parquet -------------------------------------------------------------------------------------------------------

VALUES, LABELS = [10, 20, 30, 40, 50, 60, 70, 80], [0, 1, 0, 1, 0, 1, 0, 1]
AS_STRUCT = [{"bytes": png(value), "path": None} for value in VALUES]
AS_BYTES = [png(value) for value in VALUES]


@pytest.mark.parametrize("cells", [AS_STRUCT, AS_BYTES], ids=["struct", "bytes"])
@pytest.mark.parametrize("columns", [{}, {"image_column": "img", "label_column": "fine_label"}])
def test_parquet_file_is_split_the_same_way_for_every_class(tmp_path, cells, columns):
    file = write_parquet(tmp_path / "all.parquet", cells, LABELS, **columns)
    source = parquet(file, test_fraction=0.25)
    assert sorted(values_of(source.train) + values_of(source.test)) == VALUES
    assert sorted(source.test.labels.tolist()) == [0, 1]
    for split in (source.train, source.test):
        expected = [LABELS[VALUES.index(value)] for value in values_of(split)]
        assert split.labels.tolist() == expected
        assert np.array_equal(split.images[0], pixels(values_of(split)[0]))
    assert (source.classes, source.train.images.dtype) == (("0", "1"), np.uint8)


def test_parquet_columns_with_other_names_are_named(tmp_path):
    file = write_parquet(tmp_path / "all.parquet", AS_BYTES, LABELS, "photo", "kind")
    source = parquet(file, image_column="photo", label_column="kind")
    assert len(source.train) + len(source.test) == 8


def test_parquet_folder_with_a_test_file(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", AS_BYTES[:3], LABELS[:3])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", AS_BYTES[3:6], LABELS[3:6])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", AS_BYTES[6:], LABELS[6:])
    source = parquet(tmp_path)
    assert values_of(source.train) == VALUES[:6]
    assert values_of(source.test) == VALUES[6:]
    assert source.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["val.parquet", "validation-0.parquet"])
def test_parquet_folder_with_a_validation_file(tmp_path, name):
    write_parquet(tmp_path / "train.parquet", AS_BYTES[:6], LABELS[:6])
    write_parquet(tmp_path / name, AS_BYTES[6:], LABELS[6:])
    assert values_of(parquet(tmp_path).test) == VALUES[6:]


def test_parquet_folder_without_a_test_file_is_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", AS_BYTES, LABELS)
    assert len(parquet(tmp_path, test_fraction=0.5).test) == 4


def test_named_labels_are_numbered_in_order_and_the_same_in_both_splits(tmp_path):
    write_parquet(tmp_path / "train.parquet", AS_BYTES[:3], ["newt", "cat", "dog"])
    write_parquet(tmp_path / "test.parquet", AS_BYTES[3:5], ["newt", "dog"])
    source = parquet(tmp_path)
    assert source.classes == ("cat", "dog", "newt")
    assert source.train.labels.tolist() == [2, 0, 1]
    assert source.test.labels.tolist() == [2, 1]


def test_integer_labels_stay_as_they_are(tmp_path):
    write_parquet(tmp_path / "train.parquet", AS_BYTES[:3], [4, 0, 2])
    write_parquet(tmp_path / "test.parquet", AS_BYTES[3:5], [2, 0])
    source = parquet(tmp_path)
    assert source.train.labels.tolist() == [4, 0, 2]
    assert source.test.labels.tolist() == [2, 0]
    assert source.classes == ("0", "1", "2", "3", "4")


def test_test_split_with_unknown_classes_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", AS_BYTES[:2], ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", AS_BYTES[2:4], ["cat", "newt"])
    with pytest.raises(RequestError, match=r"test split has classes that the training split lacks: newt"):
        parquet(tmp_path)


def test_gray_images_have_one_channel(tmp_path):
    file = write_parquet(tmp_path / "gray.parquet", [png(value, mode="L") for value in VALUES], LABELS)
    assert parquet(file).channels == 1


def test_one_colored_image_makes_all_colored(tmp_path):
    cells = [png(10, mode="L"), png(20), png(30, mode="RGBA"), png(40, mode="P")]
    write_parquet(tmp_path / "train.parquet", cells, [0, 1, 0, 1])
    write_parquet(tmp_path / "test.parquet", cells[1:2], [0])
    source = parquet(tmp_path)
    assert source.channels == 3
    assert values_of(source.train) == [10, 20, 30, 40]


def test_images_are_resized_on_request(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(10), png(20, 12), png(30, 16), png(40)], [0, 0, 1, 1])
    source = parquet(file, image_size=8, test_fraction=0.5)
    assert source.train.images.shape == (2, 8, 8, 3)
    assert sorted(values_of(source.train) + values_of(source.test)) == [10, 20, 30, 40]


def refused(path: Path, message: str, **options) -> None:
    with pytest.raises(RequestError, match=message):
        parquet(path, **options)


def test_images_of_several_sizes_are_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(10), png(20), png(30, 12)], [0, 0, 0])
    refused(file, rf"{file}, row 2: image of 12x12 pixels, but {file}, row 0 has 8x8; set data.image_size")


@pytest.mark.parametrize(
    ("test_picture", "found"), [(png(30, 12), "12x12x3"), (png(30, mode="L"), "8x8x1")], ids=["size", "color"]
)
def test_a_test_split_of_another_shape_is_refused(tmp_path, test_picture, found):
    write_parquet(tmp_path / "train.parquet", [png(10), png(20)], [0, 0])
    write_parquet(tmp_path / "test.parquet", [test_picture], [0])
    refused(tmp_path, rf"{tmp_path}: the test images are {found}, the training images 8x8x3")


def test_undecodable_image_is_named_by_file_and_row(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(10), b"no image", png(30)], [0, 0, 0])
    refused(file, rf"{file}, row 1: the image does not decode \(not an image, or an unknown format\)")


def gray_tiff(dtype: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0.5 if dtype == "float32" else 200 * 256, dtype)).save(stream, "TIFF")
    return stream.getvalue()


def test_images_of_16_bits_keep_their_brightness(tmp_path):
    write_parquet(tmp_path / "a.parquet", [gray_tiff("uint16")] * 4, [0, 0, 1, 1])
    assert set(values_of(parquet(tmp_path / "a.parquet", test_fraction=0.5).train)) == {200}


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "float"), ("int32", "32-bit integer")])
def test_images_of_an_unknown_range_are_refused(tmp_path, dtype, kind):
    file = write_parquet(tmp_path / "a.parquet", [png(10), gray_tiff(dtype)], [0, 0])
    refused(file, rf"{file}, row 1: the image has {kind} pixels.*allowed: 8 or 16 bits per channel")


def test_truncated_image_is_named_by_file_and_row(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(whole, "PNG")
    write_parquet(tmp_path / "train-0.parquet", [whole.getvalue()], [0])
    file = write_parquet(tmp_path / "train-1.parquet", [whole.getvalue(), whole.getvalue()[:200]], [0, 0])
    refused(tmp_path, rf"{file}, row 1: the image does not decode")


def test_rows_are_counted_over_batches(tmp_path):
    cells = [png(10)] * 1100 + [b"no image"]
    file = write_parquet(tmp_path / "a.parquet", cells, [0] * 1101)
    refused(file, rf"{file}, row 1100: the image does not decode")


def test_cell_without_bytes_is_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [{"bytes": png(1), "path": "a"}, {"bytes": None, "path": "b"}], [0, 0])
    refused(file, rf"{file}, row 1: column 'image' holds no encoded image bytes")


def test_a_missing_column_is_named_with_the_existing_ones(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES, LABELS, "photo", "kind")
    refused(file, rf"{file}: no column img or image or images \(it has: photo, kind\); set data.image_column")
    refused(file, r"no column label or .* \(it has: photo, kind\); set data.label_column", image_column="photo")
    refused(file, r"no column picture \(it has: photo, kind\)", image_column="picture")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -3], r"row 1: label -3 is negative"),
        ([0, 10**9], r"row 1: label 1000000000 is too large: .*allowed: 0 to 99999"),
        ([0, None], r"row 1: label None is neither an integer nor a name"),
        (["cat", None], r"row 1: label None is neither"),
        ([0.5, 1.5], r"row 0: label 0.5 is neither"),
    ],
)
def test_invalid_labels_are_refused(tmp_path, labels, message):
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES[:2], labels)
    refused(file, rf"{file}, {message}")


def test_missing_paths_are_refused(tmp_path):
    refused(tmp_path / "nowhere", rf"data.path: no such file or folder: {tmp_path}/nowhere")
    with pytest.raises(RequestError, match=r"data.source 'parquet' needs data.path"):
        load_source(SourceRequest("parquet"))


def test_folder_without_training_files_is_refused(tmp_path):
    write_parquet(tmp_path / "all.parquet", AS_BYTES, LABELS)
    refused(tmp_path, rf"data.path: {tmp_path} holds no train\*.parquet")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    refused(tmp_path / "a.parquet", rf"{tmp_path}/a.parquet: not a parquet file")


def test_empty_file_is_refused(tmp_path):
    file = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), file)
    refused(file, r"data.path: no images found")


def test_groups_are_carried_through_the_cache(tmp_path, reads):
    file = tmp_path / "all.parquet"
    users = ["bob", "ann", "eve", "ann", "bob", "bob", "eve", "ann"]
    pq.write_table(pa.table({"image": AS_BYTES, "label": LABELS, "user": users}), file)
    for _ in range(2):
        source = parquet(file, group_column="user", test_fraction=0.25)
        for split in (source.train, source.test):
            assert split.group_names == ("ann", "bob", "eve")
            expected = [users[VALUES.index(value)] for value in values_of(split)]
            assert [split.group_names[group] for group in split.groups] == expected
    assert len(reads) == 1
    assert parquet(file).train.groups is None  # the column was not asked for: another entry
    assert len(reads) == 2


def test_groups_of_two_splits_have_the_same_numbers(tmp_path):
    for name, users in (("train", [10, 9]), ("test", [2, 10])):
        pq.write_table(pa.table({"image": AS_BYTES[:2], "label": [0, 0], "user": users}), tmp_path / f"{name}.parquet")
    source = parquet(tmp_path, group_column="user")
    assert source.train.group_names == source.test.group_names == ("2", "9", "10")
    assert (source.train.groups.tolist(), source.test.groups.tolist()) == ([2, 1], [0, 2])


def test_missing_or_odd_group_columns_are_refused(tmp_path):
    file = tmp_path / "all.parquet"
    pq.write_table(pa.table({"image": AS_BYTES[:2], "label": [0, 0], "user": ["ann", None]}), file)
    refused(file, r"no column writer \(it has: image, label, user\); set fleet.partition_by", group_column="writer")
    refused(file, r"row 1: column 'user' is None, neither an integer nor a name", group_column="user")


# -- image folders -------------------------------------------------------------------------------------------------


def write_folder(root: Path, content: dict[str, list[int]], **options) -> Path:
    for name, values in content.items():
        for value in values:
            file = root / name / f"{value:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(value, **options).save(file)
    return root


def folder(path: Path, **options) -> image_cache.Source:
    return load_source(SourceRequest("image-folder", path, **options))


def test_folder_of_classes_is_split(tmp_path):
    write_folder(tmp_path, {"cat": [10, 20, 30, 40], "ant": [50, 60]})
    source = folder(tmp_path, test_fraction=0.5)
    assert source.classes == ("ant", "cat")
    assert sorted(source.test.labels.tolist()) == [0, 1, 1]
    for split in (source.train, source.test):
        assert split.labels.tolist() == [0 if value in (50, 60) else 1 for value in values_of(split)]


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, name):
    write_folder(tmp_path, {"cat": [10, 20, 30, 40], name: [50, 60, 70, 80]})
    assert [len(folder(tmp_path, test_fraction=share).test) for share in (0.25, 0.5)] == [2, 4]
    assert folder(tmp_path).classes == ("cat", name)


@pytest.mark.parametrize("name", ["test", "val"])
def test_folder_with_train_and_test(tmp_path, name):
    write_folder(tmp_path / "train", {"cat": [10], "dog": [20, 30], "eel": [40]})
    write_folder(tmp_path / name, {"dog": [50], "eel": [60]})
    source = folder(tmp_path)
    assert source.classes == ("cat", "dog", "eel")
    assert values_of(source.train) == [10, 20, 30, 40]
    assert (values_of(source.test), source.test.labels.tolist()) == ([50, 60], [1, 2])


def test_folder_with_train_alone_is_split(tmp_path):
    write_folder(tmp_path / "train", {"cat": [10, 20], "dog": [30, 40]})
    source = folder(tmp_path, test_fraction=0.5)
    assert source.classes == ("cat", "dog")
    assert (len(source.train), len(source.test)) == (2, 2)


def test_undecodable_file_is_named(tmp_path):
    write_folder(tmp_path, {"cat": [10, 20]})
    (tmp_path / "cat" / "broken.png").write_bytes(b"broken")
    with pytest.raises(RequestError, match=rf"{tmp_path}/cat/broken.png: the image does not decode"):
        folder(tmp_path)


def test_files_of_several_sizes_are_named(tmp_path):
    write_folder(tmp_path, {"cat": [10]})
    write_folder(tmp_path, {"dog": [20]}, size=12)
    with pytest.raises(
        RequestError, match=rf"{tmp_path}/dog/020.png: image of 12x12 pixels, but .*/cat/010.png has 8x8"
    ):
        folder(tmp_path)


def test_every_image_of_a_folder_is_read_and_notes_are_not(tmp_path):
    write_folder(tmp_path, {"cat": [10, 20], "dog": [30, 40]})
    picture(50).save(tmp_path / "cat" / "050.GIF", save_all=True, append_images=[picture(60)])
    (tmp_path / "cat" / "notes.txt").write_text("two cats")
    source = folder(tmp_path, test_fraction=0.4)
    assert sorted(values_of(source.train) + values_of(source.test)) == [10, 20, 30, 40, 50]
    (tmp_path / "dog" / "drawing.svg").write_text("<svg/>")
    with pytest.raises(RequestError, match=r"dog/drawing.svg: the image does not decode"):
        folder(tmp_path)


def test_class_folders_behind_links_are_read_again_when_they_change_and_notes_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    disk = write_folder(tmp_path / "disk", {"cup": [*range(10)], "bottle": [*range(10)]})
    linked = tmp_path / "set"
    linked.mkdir()
    for name in ("cup", "bottle"):
        (linked / name).symlink_to(disk / name)
    found = folder(linked)
    assert len(found.train) + len(found.test) == 20
    (disk / "cup" / "notes.txt").write_text("more to come")
    kept = set((tmp_path / "cache" / "images").iterdir())
    folder(linked)
    assert set((tmp_path / "cache" / "images").iterdir()) == kept
    write_folder(tmp_path / "disk", {"cup": [*range(15)]})
    found = folder(linked)
    assert len(found.train) + len(found.test) == 25
    (linked / "cup").rename(linked / "mug")  # the same files under another label
    assert folder(linked).classes == ("bottle", "mug")


@pytest.mark.parametrize("content", [[], ["cat"]], ids=["nothing", "an empty class"])
def test_folder_without_images_is_refused(tmp_path, content):
    for name in content:
        (tmp_path / name).mkdir()
    with pytest.raises(RequestError, match=rf"data.path: {tmp_path} is not an image folder"):
        folder(tmp_path)


def test_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=rf"data.path: {tmp_path}/file is not an image folder"):
        folder(tmp_path / "file")


# -- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """A list that grows whenever a parquet source is decoded."""
    counted, kind = [], sources.source_kind("parquet")

    def count(request: SourceRequest) -> image_cache.Source:
        counted.append(str(request.path))
        return kind.read(request)

    monkeypatch.setitem(sources.SOURCES._objects, "parquet", replace(kind, read=count))
    return counted


def test_images_are_decoded_once_and_memory_mapped(tmp_path, reads):
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES, LABELS)
    first, second = parquet(file), parquet(file)
    assert len(reads) == 1
    assert isinstance(second.train.images, np.memmap)
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)
    assert second.classes == first.classes


def test_changed_files_and_other_requests_are_decoded_again(tmp_path, reads):
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES, LABELS)
    parquet(file)
    for count, options in enumerate(({"image_size": 10}, {"test_fraction": 0.5}, {"seed": 1}), start=2):
        parquet(file, **options)
        assert len(reads) == count
    write_parquet(file, [png(value + 1) for value in VALUES], LABELS)
    os.utime(file, ns=(1, 1))
    changed = parquet(file)
    assert len(reads) == 5
    assert sorted(values_of(changed.train) + values_of(changed.test)) == [value + 1 for value in VALUES]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    assert image_cache.cache_folder() == tmp_path / "cache"
    load_source(SourceRequest("digits"))
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1
    monkeypatch.delenv("LIGHTCL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_cache.cache_folder() == tmp_path / ".cache" / "lightcl"


def test_a_reader_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES, LABELS)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "sync", die)  # after the files, before the entry has its name
        with pytest.raises(KeyboardInterrupt):
            image_cache.write_source(
                tmp_path / "cache" / "images" / "set", read_parquet(SourceRequest("parquet", file))
            )
    assert list((tmp_path / "cache" / "images").iterdir()) == []


@pytest.mark.parametrize("name", ["train-images.npy", "test-labels.npy", "classes.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "zeros"])
def test_an_entry_made_unreadable_by_a_power_failure_is_rebuilt(tmp_path, monkeypatch, reads, name, damage):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES, LABELS)
    parquet(file)
    (entry,) = (tmp_path / "cache" / "images").iterdir()
    content = (entry / name).read_bytes()
    (entry / name).unlink()
    if damage != "missing":
        left = {"empty": b"", "half": content[: len(content) // 2], "zeros": bytes(len(content))}
        (entry / name).write_bytes(left[damage])
    source = parquet(file)
    assert sorted(values_of(source.train) + values_of(source.test)) == VALUES
    assert ((entry / name).read_bytes(), len(reads)) == (content, 2)
    parquet(file)
    assert len(reads) == 2
    assert list((tmp_path / "cache" / "images").iterdir()) == [entry]


def test_an_entry_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Otherwise a power failure may leave an entry with empty files."""
    done: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(image_cache, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "rename", lambda path, to: (rename(path, to), done.append(f"rename {path.name}"))[0])
    images = ImageSet(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), ("a", "b"))
    image_cache.write_source(tmp_path / "images" / "entry", image_cache.Source(images, images))
    assert sorted(done[:5]) == [
        "sync classes.json",
        *(f"sync {p}-{k}.npy" for p in ("test", "train") for k in ("images", "labels")),
    ]
    assert done[5:] == ["sync set", "rename set", "sync images"]


def test_the_second_of_two_processes_keeps_the_firsts_copy(tmp_path):
    images = ImageSet(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), ("a", "b"))
    for _ in range(2):
        image_cache.write_source(tmp_path / "images" / "set", image_cache.Source(images, images))
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["set"]


# -- names and packages --------------------------------------------------------------------------------------------


def test_unknown_source_is_refused_with_the_nearest_name():
    with pytest.raises(RequestError, match=r"data.source is 'cifar11': unknown, did you mean 'cifar10'\? \(allowed:"):
        load_source(SourceRequest("cifar11"))


def test_a_plugin_adds_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.SOURCES, "_objects", dict(sources.SOURCES))
    calls = []

    def stripes(request: SourceRequest) -> image_cache.Source:
        calls.append(request.image_size)
        size = request.image_size or 8
        images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, size, size, 1), np.uint8)
        return split_off_test(ImageSet(images, np.arange(20) % 2, ("odd", "even")), request.test_fraction, request.seed)

    register_source("stripes", stripes)
    for _ in range(2):
        assert load_source(SourceRequest("stripes", image_size=4)).train.images.shape == (16, 4, 4, 1)
    assert calls == [4]
    assert Data(source="stripes").request(0).name == "stripes"
    with pytest.raises(RequestError, match="data source 'digits' is built in"):
        register_source("digits", stripes)
    with pytest.raises(RequestError, match=r"data source 'stripes' is registered twice: by .*stripes and by .*fashion"):
        register_source("stripes", fashion)


@pytest.mark.parametrize(
    ("name", "package"),
    [("digits", "sklearn"), ("cifar10", "torchvision"), ("parquet", "pyarrow")],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    file = write_parquet(tmp_path / "a.parquet", AS_BYTES, LABELS)
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    with pytest.raises(RequestError, match=rf"{package} is needed for data.source: {name} .*lightcl-fleet\[data\]"):
        load_source(SourceRequest(name, file if name == "parquet" else None))


class Without:
    """Makes a package look as if it were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_image_folders_need_pillow_alone(tmp_path):
    """In a separate process in which the other packages cannot be imported."""
    write_folder(tmp_path / "set", {"cat": [10, 20], "dog": [30, 40]})
    code = f"""
import sys
for name in ("torchvision", "pyarrow", "sklearn", "datasets", "flwr_datasets"):
    sys.modules[name] = None
from pathlib import Path
from lightcl.data.partition import partition
from lightcl.data.section import Fleet
from lightcl.data.sources import SourceRequest, load_source
source = load_source(SourceRequest("image-folder", Path({str(tmp_path / "set")!r}), test_fraction=0.5))
print(source.classes, partition(source, Fleet(devices=2, partition="dirichlet"), 0).sizes.sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "('cat', 'dog') 2\n"


def test_folders_are_read_in_torchvisions_order(tmp_path):
    write_folder(tmp_path, {"b": [10, 20], "a/y": [30], "a": [40], "a/x/z": [50], "B": [60]})
    (tmp_path / "a" / "010.PNG").write_bytes(png(70))
    listing = torchvision.datasets.ImageFolder(str(tmp_path), is_valid_file=lambda file: True)
    ours = _class_names(tmp_path)
    assert ours == listing.classes
    assert [file for name in ours for file in _image_files(tmp_path / name)] == [file for file, _ in listing.samples]


# -- splitting and batching ----------------------------------------------------------------------------------------


def test_split_takes_the_same_share_of_every_class():
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    images = ImageSet(np.arange(35, dtype=np.uint8).reshape(35, 1, 1, 1), labels, ("a", "b", "c"))
    source = split_off_test(images, 0.2, seed=3)
    assert np.bincount(source.test.labels).tolist() == [2, 4, 1]
    assert np.bincount(source.train.labels).tolist() == [8, 16, 4]
    both = np.concatenate([source.train.images, source.test.images]).flatten()
    assert sorted(both.tolist()) == list(range(35))
    again, other = split_off_test(images, 0.2, seed=3), split_off_test(images, 0.2, seed=4)
    assert np.array_equal(again.test.images, source.test.images)
    assert not np.array_equal(other.test.images, source.test.images)


@pytest.mark.parametrize(("fraction", "verb"), [(0.999, "no training images; lower"), (0.001, "no test images; raise")])
def test_a_split_that_leaves_no_images_is_refused(fraction, verb):
    images = ImageSet(np.zeros((20, 1, 1, 1), np.uint8), np.arange(20) % 2, ("a", "b"))
    with pytest.raises(RequestError, match=rf"data.test_fraction: {fraction} of every class of 20 images .* {verb} it"):
        split_off_test(images, fraction, seed=0)


def test_batches_are_consecutive_and_the_last_may_be_smaller():
    images = ImageSet(np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1), np.arange(7), tuple("abcdefg"))
    batches = list(iter_batches(images, 3))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(pictures.flatten().tolist() == labels.tolist() for pictures, labels in batches)


def test_a_scenario_splits_a_parquet_file_by_its_users(tmp_path):
    file = tmp_path / "all.parquet"
    users = ["bob", "ann"] * 4
    pq.write_table(pa.table({"image": AS_BYTES, "label": [0, 0, 1, 1] * 2, "user": users}), file)
    scenario = toys.scenario(
        data={"source": "parquet", "path": str(file), "test_fraction": 0.5},
        fleet={"devices": 3, "partition": "natural", "partition_by": "user"},
    )
    source = load_source(scenario.source_request())
    shares = partition(source, scenario.fleet, scenario.seed)
    for name, share in zip(("ann", "bob"), shares, strict=False):
        for split, indices in ((source.train, share.train), (source.test, share.test)):
            images = ImageSet(split.images[indices], split.labels[indices], split.classes)
            assert {users[VALUES.index(value)] for value in values_of(images)} <= {name}
    assert shares.sizes.tolist()[2] == 0
    assert shares.sizes.sum() == 4
