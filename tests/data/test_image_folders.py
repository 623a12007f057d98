"""Reading single pictures: class folders, parts, zips, tables, and every way in which they can be wrong."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from picturing import lay, packed, pixels, png
from scforget.data import image_folders
from scforget.data.images import Images, read, recognises
from scforget.errors import DataError

GREY, COLOUR = pixels(4, 3, 5), pixels(4, 3, 5, 3, seed=1)
CLASSES = {"a/1.png": png(GREY[0]), "a/2.png": png(GREY[1]), "b/1.png": png(GREY[2]), "b/2.png": png(GREY[3])}
PARTS = {"train/a/1.png": png(GREY[0]), "train/b/1.png": png(GREY[1]), "test/b/1.png": png(GREY[2])}
FLAT = {f"{i}.png": png(GREY[i]) for i in range(4)}

Put = Callable[[Path, dict[str, bytes]], Path]


def zipped(folder: Path, files: dict[str, bytes]) -> Path:
    packed(folder / "set.zip", files)
    return folder


@pytest.fixture(params=["folder", "zip in a folder", "zip"])
def put(request: pytest.FixtureRequest) -> Put:
    ways: dict[str, Put] = {
        "folder": lay, "zip in a folder": zipped, "zip": lambda folder, files: packed(folder / "set.zip", files)
    }  # fmt: skip
    return ways[request.param]


def table(*lines: str) -> dict[str, bytes]:
    return {"metadata.csv": "\n".join(lines).encode()}


def test_read_takes_class_folders(tmp_path: Path, put: Put) -> None:
    found = read(put(tmp_path / "s", CLASSES | {"readme.txt": b"", ".x/1.png": b"", "__MACOSX/a/._1.png": b""}))
    assert found.names.tolist() == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    assert found.labels.tolist() == ["a", "a", "b", "b"]
    assert set(found.identities) == {""}
    assert not found.test.any()
    np.testing.assert_array_equal(found.inputs, GREY[:, None])


@pytest.mark.parametrize("wrapper", ["", "set/", "set/1.0/"])
def test_read_takes_train_and_test_folders(tmp_path: Path, put: Put, wrapper: str) -> None:
    found = read(put(tmp_path / "s", {f"{wrapper}{name}": content for name, content in PARTS.items()}))
    assert found.names.tolist() == ["test/b/1.png", "train/a/1.png", "train/b/1.png"]
    assert found.labels.tolist() == ["b", "a", "b"]
    assert found.test.tolist() == [True, False, False]


def test_read_follows_the_table(tmp_path: Path, put: Put) -> None:
    lines = "identity,file,note,label,split", " p,2.png,x,b ,test", ",0.png,x,a,train", "q,1.png,x,b,", "NA,3.png,x,a,"
    found = read(put(tmp_path / "s", FLAT | table(*lines)))
    assert found.names.tolist() == ["0.png", "1.png", "2.png", "3.png"]
    assert found.labels.tolist() == ["a", "b", "b", "a"]
    assert found.identities.tolist() == ["", "q", "p", ""]  # who is not available is nobody
    assert found.test.tolist() == [False, False, True, False]
    np.testing.assert_array_equal(found.inputs, GREY[:, None])


def test_read_takes_the_folder_s_word_where_the_table_has_none(tmp_path: Path, put: Put) -> None:
    lines = "file,identity,label,split", "train/a/1.png,p,,", "train/b/1.png,q,c,", "test/b/1.png,r,c,train"
    found = read(put(tmp_path / "s", PARTS | table(*lines)))
    assert found.labels.tolist() == ["c", "a", "c"]
    assert found.test.tolist() == [False, False, False]
    assert found.identities.tolist() == ["r", "p", "q"]


def test_read_takes_a_table_beside_the_zip(tmp_path: Path) -> None:
    folder = lay(zipped(tmp_path / "s", FLAT), table("file,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(4))))
    assert read(folder).labels.tolist() == ["a", "b", "a", "b"]
    packed(folder / "set.zip", FLAT | table("file"))
    with pytest.raises(DataError, match=r"another one in set\.zip"):
        read(folder)


def test_read_makes_grey_pictures_among_coloured_ones_coloured(tmp_path: Path) -> None:
    files = {"a/1.png": png(COLOUR[0]), "b/2.png": png(GREY[0]), "b/3.png": png(GREY[1], "1"),
             "b/4.png": png(COLOUR[1], "RGBA"), "b/5.png": png(GREY[1], "LA")}  # fmt: skip
    found = read(lay(tmp_path / "s", files))
    assert found.inputs.shape == (5, 3, 3, 5)
    np.testing.assert_array_equal(found.inputs[0], COLOUR[0].transpose(2, 0, 1))
    np.testing.assert_array_equal(found.inputs[1], np.stack([GREY[0]] * 3))
    assert set(found.inputs[2].ravel()) <= {0, 255}
    np.testing.assert_array_equal(found.inputs[3], COLOUR[1].transpose(2, 0, 1))
    np.testing.assert_array_equal(found.inputs[4, 0], GREY[1])


def test_read_takes_jpegs_and_any_case(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(COLOUR[0]).save(out, "JPEG")
    found = read(
        lay(tmp_path / "s", {"a/1.JPG": out.getvalue(), "b/2.jpeg": out.getvalue(), "b/3.png": png(COLOUR[1])})
    )
    with Image.open(out) as picture:
        np.testing.assert_array_equal(found.inputs[0], np.asarray(picture).transpose(2, 0, 1))


def test_read_keeps_the_order_over_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folders, "_AT_ONCE", 3)
    many = pixels(20, 2, 2, seed=3)
    found = read(zipped(tmp_path / "s", {f"{'ab'[i % 2]}/{i:02d}.png": png(many[i]) for i in range(20)}))
    np.testing.assert_array_equal(found.inputs[:, 0], np.concatenate([many[::2], many[1::2]]))


def test_read_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(lay(tmp_path / "s", CLASSES))
    assert "s: 4 of 4 images in " in capsys.readouterr().err


def bad(array: npt.NDArray[np.uint16] | None = None) -> bytes:
    if array is None:
        return png(GREY[0])[:-30]
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (CLASSES | {"b/2.png": png(pixels(1, 4, 5)[0])}, "'b/2.png' of 5 x 4 pixels; wanted 5 x 3 as the first has"),
        (CLASSES | {"b/2.png": bad()}, r"'b/2.png', \w+ on reading; wanted whole"),
        (CLASSES | {"b/2.png": b"text"}, r"'b/2.png', UnidentifiedImageError on reading"),
        (CLASSES | {"a/1.png": b""}, r"'a/1.png', UnidentifiedImageError on reading"),
        (CLASSES | {"b/2.png": bad(np.zeros((3, 5), np.uint16))}, "'b/2.png' of Pillow's mode I;16"),
        ({"a/1.png": png(GREY[0]), "a/2.png": png(GREY[1])}, "a single class, 'a'"),
        (FLAT, "'0.png', of no class; wanted CLASS/picture"),
        (CLASSES | {"b/deep/3.png": b""}, "'b/deep/3.png', of no class"),
        (CLASSES | {"9.png": b""}, "'9.png', of no class"),
        (PARTS | {"test/c/1.png": png(GREY[3])}, "class 'c' among the test images only"),
        (FLAT | table("file,label", "0.png,a", "1.png,b", "2.png,a"), r"metadata.csv: found no line for '3\.png'"),
        (FLAT | table("file,label", *(f"{i}.png,{i}" for i in range(5))), r"found '4\.png', which is not there"),
        (FLAT | table("file,label", *(f"{i}.png,{i}" for i in (0, 1, 2, 3, 0))), r"'0\.png' more than once"),
        (FLAT | table("name,label", "0.png,a"), "columns name, label; wanted a column 'file'"),
        (FLAT | table("file,label", "0.png,a,b,c", "1.png,a,b,c,d"), "a table in UTF-8"),
        (FLAT | table(""), "a table in UTF-8"),
        (FLAT | {"metadata.csv": b"file,label\n\xff\xfe,a"}, "a table in UTF-8"),
        (FLAT | table("file,label", *(f"{i}.png,{'a' * (i % 2)}" for i in range(4))), r"'0\.png', of no class"),
        (FLAT | table("file,label,split", *(f"{i}.png,{i},val" for i in range(4))), "split 'val' of '0.png'"),
        (CLASSES | {f"a/{name}": text for name, text in table("file").items()}, "'b/1.png' outside its folder"),
        (CLASSES | table("file") | {f"a/{name}": text for name, text in table("file").items()}, "one metadata.csv"),
    ],
)
def test_read_refuses_pictures_that_are_no_set(tmp_path: Path, put: Put, files: dict[str, bytes], said: str) -> None:
    path = put(tmp_path / "s", files)
    assert recognises(path)
    with pytest.raises(DataError, match=said) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_read_refuses_zips_that_are_none_or_empty_or_beside_pictures(tmp_path: Path) -> None:
    for content in (b"", b"no zip", packed(tmp_path / "x.zip", CLASSES).read_bytes()[:-30]):
        with pytest.raises(DataError, match=r"set\.zip: found BadZipFile"):
            read(lay(tmp_path / "s", {"set.zip": content}))
    with pytest.raises(DataError, match=r"no picture; wanted \.png"):
        read(zipped(tmp_path / "s", {"notes.txt": b""}))
    lay(zipped(tmp_path / "s", CLASSES), {"a/1.png": b""})
    with pytest.raises(DataError, match=r"wanted one \.zip, or pictures"):
        read(tmp_path / "s")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_read_refuses_a_zip_with_two_files_of_one_name(tmp_path: Path) -> None:
    import zipfile

    zipped(tmp_path / "s", CLASSES)
    with zipfile.ZipFile(tmp_path / "s/set.zip", "a") as archive:
        archive.writestr("a/1.png", png(GREY[3]))
    with pytest.raises(DataError, match=r"'a/1\.png' more than once; wanted unique names"):
        read(tmp_path / "s")


def test_read_refuses_a_zip_whose_contents_are_damaged_or_locked(tmp_path: Path) -> None:
    path = packed(tmp_path / "s.zip", CLASSES)
    content = bytearray(path.read_bytes())
    at = content.index(CLASSES["b/2.png"])
    content[at + 20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'b/2\.png', BadZipFile on reading"):
        read(path)


def same(one: Images, other: Images) -> bool:
    return all(np.array_equal(getattr(one, key), getattr(other, key)) for key in vars(one))


def test_read_gives_the_same_from_a_folder_and_from_its_zip(tmp_path: Path) -> None:
    assert same(read(lay(tmp_path / "one", PARTS)), read(packed(tmp_path / "two.zip", PARTS)))


def test_read_refuses_a_column_that_only_looks_like_one_it_knows(tmp_path: Path, put: Put) -> None:
    lines = "file,label,Identity", *(f"{i}.png,{'ab'[i % 2]},p" for i in range(4))
    with pytest.raises(DataError, match="column 'Identity'; wanted 'identity'"):
        read(put(tmp_path / "s", FLAT | table(*lines)))


def test_read_refuses_a_table_that_cannot_be_unpacked(tmp_path: Path) -> None:
    lines = "file,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(4))
    path = zipped(tmp_path / "s", FLAT | table(*lines)) / "set.zip"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("metadata.csv")
    start = entry.header_offset + 30 + len("metadata.csv")
    path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    with pytest.raises(DataError, match=r"metadata\.csv"):
        read(path.parent)


def test_read_refuses_a_file_that_unpacks_to_more_than_any_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folders, "_LARGEST", 50)
    with pytest.raises(DataError, match="ValueError on reading"):
        read(zipped(tmp_path / "s", CLASSES))
