"""Reading image sets in every layout they come in, the bundled digits, and dropping what is there twice."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picturing import Pixels, lay, pixels
from scforget.data import image_files
from scforget.data.images import Images, read, recognises, without_duplicates, write_digits
from scforget.errors import DataError


def idx(values: Pixels) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


# IDX

TRAIN, TEST, CODES = pixels(6, 4, 5), pixels(3, 4, 5, seed=1), np.array([0, 1, 2, 9, 1, 0], np.uint8)


def idx_files(ending: str = "") -> dict[str, bytes]:
    pack: Callable[[bytes], bytes] = gzip.compress if ending else bytes
    return {
        f"train-images-idx3-ubyte{ending}": pack(idx(TRAIN)),
        f"train-labels-idx1-ubyte{ending}": pack(idx(CODES)),
        f"t10k-images-idx3-ubyte{ending}": pack(idx(TEST)),
        f"t10k-labels-idx1-ubyte{ending}": pack(idx(CODES[:3])),
    }


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("wrapped", ["", "set/raw/"])
def test_read_takes_mnist_s_files(tmp_path: Path, ending: str, wrapped: str) -> None:
    found = read(lay(tmp_path / "m", {f"{wrapped}{name}": part for name, part in idx_files(ending).items()}))
    np.testing.assert_array_equal(found.inputs, np.concatenate([TRAIN, TEST])[:, None])
    assert found.labels.tolist() == ["0", "1", "2", "9", "1", "0", "0", "1", "2"]
    assert found.test.tolist() == [False] * 6 + [True] * 3
    assert len(set(found.names)) == 9
    assert set(found.identities) == {""}


def test_read_knows_fashion_mnist_by_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(image_files, "_FASHION_LABELS", hashlib.sha256(idx(CODES)).hexdigest())
    found = read(lay(tmp_path / "m", idx_files(".gz")))
    named = ["T-shirt/top", "Trouser", "Pullover", "Ankle boot", "Trouser", "T-shirt/top"]
    assert found.labels.tolist() == [*named, *named[:3]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-images-idx3-ubyte", idx(TRAIN)[:-1], "119 bytes of values; wanted 6 x 4 x 5"),
        ("train-images-idx3-ubyte", idx(TRAIN) + b"x", "121 bytes of values"),
        ("train-images-idx3-ubyte", idx(CODES), "begin with 0x00000801; wanted IDX, 0x00000803"),
        ("train-labels-idx1-ubyte", b"", "0 bytes that begin with"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0", "5 bytes that begin with"),
        ("train-labels-idx1-ubyte", idx(CODES[:5]), "6 train images, 5 labels"),
        ("t10k-images-idx3-ubyte", idx(pixels(3, 5, 5)), r"images \(5, 5\); wanted \(4, 5\)"),
        ("train-labels-idx1-ubyte", None, "no file of the train labels"),
        ("t10k-labels-idx1-ubyte", None, "no file of the test labels"),
        ("train-labels.idx1-ubyte", idx(CODES), "both train-labels"),
    ],
)
def test_read_refuses_damaged_idx(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    files = idx_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    with pytest.raises(DataError, match=said) as caught:
        read(lay(tmp_path / "m", files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(idx(CODES), mtime=0)[:-9]], ids=["none", "cut off"])
def test_read_refuses_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: found \w+ on reading"):
        read(lay(tmp_path / "m", idx_files(".gz") | {"train-labels-idx1-ubyte.gz": content}))


# CIFAR-10


def batch(n: int, seed: int, **changes: Any) -> dict[bytes, Any]:
    made = {b"data": pixels(n, 3072, seed=seed), b"labels": [i % 3 for i in range(n)]}
    return made | {key.encode(): value for key, value in changes.items()}


def cifar(protocol: int, **first: Any) -> dict[str, bytes]:
    def dump(value: Any) -> bytes:
        return pickle.dumps(value, protocol=protocol)

    meta = {b"label_names": [b"plane", b"car", b"bird"]}
    return {
        "data_batch_1": dump(batch(4, 0, **first)), "data_batch_2": dump(batch(3, 1)),
        "test_batch": dump(batch(2, 2)), "batches.meta": dump(meta), "readme.html": b"",
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("home", ["", "cifar-10-batches-py/"])
def test_read_takes_cifar_10_s_batches(tmp_path: Path, protocol: int, home: str) -> None:
    found = read(lay(tmp_path / "c", {f"{home}{name}": part for name, part in cifar(protocol).items()}))
    assert found.inputs.shape == (9, 3, 32, 32)
    np.testing.assert_array_equal(found.inputs[4, 2, 5, 6], pixels(3, 3072, seed=1)[0, 2 * 1024 + 5 * 32 + 6])
    assert found.labels.tolist() == ["plane", "car", "bird", "plane", "plane", "car", "bird", "plane", "car"]
    assert found.test.tolist() == [False] * 7 + [True] * 2
    assert len(set(found.names)) == 9


class _Malice:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


@pytest.mark.parametrize("value", [_Malice(), Path("x"), np.array([_Malice()], dtype=object), {1: {2: [_Malice()]}}])
def test_read_runs_nothing_that_a_pickle_asks_for(tmp_path: Path, capsys: Any, value: Any) -> None:
    with pytest.raises(DataError, match=r"UnpicklingError: .*no array, bytes or plain container") as caught:
        read(lay(tmp_path / "c", cifar(2, other=value)))
    assert "this ran" not in capsys.readouterr().out
    assert "\n" not in str(caught.value)


def test_read_uses_no_codec_that_a_pickle_names(tmp_path: Path) -> None:
    bomb = b"c_codecs\nencode\n(Vabc\nVrot13\ntR."
    with pytest.raises(DataError, match="codec 'rot13'"):
        read(lay(tmp_path / "c", cifar(2) | {"data_batch_1": bomb}))


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ({"data": [1, 2]}, "no array 'data' of bytes"),
        ({"data": pixels(4, 100)}, "no array 'data'"),
        ({"labels": [0, 1]}, "not one label for each image; wanted 4"),
        ({"labels": [0, 1, 2, 3]}, "a label that batches.meta does not name; wanted 0 to 2"),
        ({"labels": [0, 1, 2, "x"]}, "a label that batches.meta"),
    ],
)
def test_read_refuses_batches_of_other_contents(tmp_path: Path, first: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(lay(tmp_path / "c", cifar(2, **first)))


def test_read_refuses_batches_that_are_cut_short_or_without_names(tmp_path: Path) -> None:
    files = cifar(2)
    for name, content, said in (
        ("data_batch_1", files["data_batch_1"][:-20], "data_batch_1: found"),
        ("data_batch_1", pickle.dumps([1]), "a list; wanted a dict"),
        ("batches.meta", pickle.dumps({}), "no list 'label_names'"),
    ):
        with pytest.raises(DataError, match=said):
            read(lay(tmp_path / "c", files | {name: content}))
    (tmp_path / "c/batches.meta").unlink()
    with pytest.raises(DataError, match=r"no batches\.meta"):
        read(tmp_path / "c")


# npz


def npz(folder: Path, **arrays: Any) -> Path:
    folder.mkdir(exist_ok=True)
    base = {"images": pixels(4, 3, 5), "labels": np.array([0, 1, 1, 0])}
    np.savez(folder / "images.npz", **base | arrays)
    return folder


def test_read_takes_arrays_in_either_order_of_axes(tmp_path: Path) -> None:
    grey, colour = pixels(4, 6, 5), pixels(4, 6, 5, 3)
    np.testing.assert_array_equal(read(npz(tmp_path / "a", images=grey)).inputs, grey[:, None])
    wanted = colour.transpose(0, 3, 1, 2)
    for layout in (colour, wanted):
        np.testing.assert_array_equal(read(npz(tmp_path / "a", images=layout)).inputs, wanted)
    people = {"identities": np.array(["x", "", "y", "x"]), "test": np.array([False, False, True, False])}
    found = read(npz(tmp_path / "a", **people, names=np.array(["a", "b", "c", "d"])) / "images.npz")
    assert found.identities.tolist() == ["x", "", "y", "x"]
    assert found.obs.to_dict("list") == {
        "label": ["0", "1", "1", "0"],
        "donor": ["x", "", "y", "x"],
        "test": [False, False, True, False],
    }
    assert found.obs.index.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": pixels(4, 3, 5).astype(float)}, r"images float64 \[4, 3, 5\]"),
        ({"images": pixels(4, 2, 5, 4)}, r"images uint8 \[4, 2, 5, 4\]"),
        ({"images": pixels(0, 3, 5), "labels": np.zeros(0, int)}, "0 images"),
        ({"images": pixels(4, 0, 5)}, "at least one pixel"),
        ({"labels": np.array([0, 1])}, "2 labels for 4 images"),
        ({"labels": np.array([0.5, 1, 1, 0])}, "labels float64"),
        ({"labels": np.array([1, 1, 1, 1])}, "a single class, '1'"),
        ({"labels": np.array(["", "a", "b", "b"])}, "no label of '0'"),
        ({"names": np.array(["a", "b", "a", "c"])}, "two images named 'a'"),
        ({"identities": np.array(["a"])}, "1 identities for 4"),
        ({"test": np.array([0, 1, 1, 0])}, r"test int64 \[4\]; wanted bool"),
        ({"test": np.array([True])}, r"test bool \[1\]"),
        ({"test": np.ones(4, bool)}, "none of them to train on"),
        ({"test": np.array([True, False, False, True])}, "single class"),
        ({"labels": np.array([0, 1, 2, 0]), "test": np.array([0, 0, 1, 0], bool)}, "class '2' among the test images"),
        ({"labels": np.array([None, 1, 1, 0], dtype=object)}, "ValueError"),
    ],
)
def test_read_refuses_arrays_that_are_no_image_set(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(npz(tmp_path / "a", **arrays))
    assert "\n" not in str(caught.value)


def test_read_refuses_npz_that_is_none_or_lacks_an_array(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a/images.npz", labels=np.arange(3))
    with pytest.raises(DataError, match="arrays labels; wanted an array 'images'"):
        read(tmp_path / "a")
    for content in (b"", b"PK\x03\x04 no zip", (tmp_path / "a/images.npz").read_bytes()[:-40]):
        with pytest.raises(DataError, match=r"images\.npz: found \w+"):
            read(lay(tmp_path / "a", {"images.npz": content}))
    np.save(tmp_path / "bare.npy", np.arange(3))
    with pytest.raises(DataError, match=r"bare\.npz: found TypeError"):
        read((tmp_path / "bare.npy").rename(tmp_path / "bare.npz"))
    np.savez(tmp_path / "a/other.npz", labels=np.arange(3))
    with pytest.raises(DataError, match=r"images.npz, other.npz; wanted one .npz"):
        read(tmp_path / "a")


# what is there, duplicates, digits


def test_read_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; wanted IDX files"):
        read(tmp_path / "none")
    lay(tmp_path, {"empty/.keep": b"", "notes/a.txt": b"x", "a.txt": b"x"})
    for name in ("empty", "notes", "a.txt"):
        assert not recognises(tmp_path / name)
        with pytest.raises(DataError, match="nothing that is an image set; wanted IDX files"):
            read(tmp_path / name)


def test_recognises_leaves_cells_to_their_reader(tmp_path: Path) -> None:
    lay(tmp_path, {"a/cells.h5ad": b"", "a/umap.png": b"", "b/matrix.mtx.gz": b"", "c/x/umap.png": b""})
    assert [recognises(tmp_path / name) for name in "abc"] == [False, False, True]
    assert not recognises(tmp_path / "a/cells.h5ad")
    assert not recognises(tmp_path / "none")


def made(codes: str, labels: str = "", identities: str = "") -> Images:
    n = len(codes)
    people = np.array([name.replace("-", "") for name in identities or "-" * n])
    inputs = np.stack([np.full((1, 2, 2), ord(code), np.uint8) for code in codes])
    names = np.array([f"n{i}" for i in range(n)])
    return Images(inputs, np.array(list(labels or "x" * n)), people, names, np.zeros(n, dtype=bool))


def test_without_duplicates_keeps_the_first_and_the_order() -> None:
    found = without_duplicates(made("bacab"))
    assert found.images.names.tolist() == ["n0", "n1", "n2"]
    assert found[1:] == (2, 0)
    assert len({image.tobytes() for image in found.images.inputs}) == 3


def test_without_duplicates_keeps_an_identity_that_one_of_them_has() -> None:
    found = without_duplicates(made("aabb", identities="-pq-"))
    assert found.images.names.tolist() == ["n0", "n2"]
    assert found.images.identities.tolist() == ["p", "q"]


def test_without_duplicates_drops_every_copy_of_an_image_of_two_people() -> None:
    found = without_duplicates(made("abaca", identities="ppqp-"))
    assert found.images.names.tolist() == ["n1", "n3"]
    assert found[1:] == (0, 3)


def test_without_duplicates_agrees_with_a_slow_search() -> None:
    rng = np.random.default_rng(0)
    codes = "".join(rng.choice(list("abcdefghijkl"), 40))
    people = "".join(rng.choice(list("-----p"), 20)) + "".join(rng.choice(list("----q"), 20))
    images = made(codes, identities=people)
    kept, disputed = [], 0
    for code in dict.fromkeys(codes):
        same = [i for i in range(40) if codes[i] == code]
        owners = {people[i] for i in same} - {"-"}
        disputed += len(same) if len(owners) > 1 else 0
        kept += [same[0]] if len(owners) <= 1 else []
    found = without_duplicates(images)
    assert found.images.names.tolist() == [f"n{i}" for i in sorted(kept)]
    assert found[1:] == (40 - len(kept) - disputed, disputed)
    assert disputed > 0


def test_write_digits_writes_the_same_bytes_each_time_and_the_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    for name in ("one", "two"):
        write_digits(tmp_path / name)
    for file in ("images.npz", "ATTRIBUTION.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    found, digits = read(tmp_path / "one"), load_digits()
    assert found.inputs.shape == (1797, 1, 8, 8)
    assert np.abs(found.inputs[:, 0] / 255 * 16 - digits.images).max() <= 0.5 * 16 / 255
    assert (found.inputs.min(), found.inputs.max()) == (0, 255)
    assert found.labels.tolist() == [str(digit) for digit in digits.target]
    assert "CC BY 4.0" in (tmp_path / "one/ATTRIBUTION.md").read_text()
