"""Public sets of images: from a Debian package, downloaded or installed already."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from picturing import pixels
from scforget.data import images, public
from scforget.data.public import PUBLIC, PublicSet, fetch
from scforget.errors import DataError

HOME = "usr/share/datasets/toy"
TRAIN, CODES = pixels(4, 3, 5), np.array([0, 1, 1, 0], np.uint8)
FILES = {
    "train-images-idx3-ubyte.gz": gzip.compress(struct.pack(">4I", 0x803, *TRAIN.shape) + TRAIN.tobytes(), mtime=0),
    "train-labels-idx1-ubyte.gz": gzip.compress(struct.pack(">2I", 0x801, *CODES.shape) + CODES.tobytes(), mtime=0),
}
LINES = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in FILES.items())
INSTALLED = hashlib.sha256(LINES.encode()).hexdigest()


def tar(names: dict[str, bytes], mode: str = "w:xz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def deb(data: bytes, *, name: str = "data.tar.xz", control: bytes = b"odd") -> bytes:
    """As ar(5) has it: headers of 60 bytes, contents that end at even places."""
    parts = b"!<arch>\n"
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", control), (name, data)):
        header = f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        parts += header.encode() + content + b"\n" * (len(content) % 2)
    return parts


def offer(monkeypatch: pytest.MonkeyPatch, package: bytes, installed: Path | None = None) -> str:
    """A set whose package is ``package``, that nobody can download."""
    sha256 = hashlib.sha256(package).hexdigest()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    where = None if installed is None else (installed, INSTALLED)
    files = {"toy.deb": "http://127.0.0.1:9/x"}
    one = PublicSet(files=files, sha256=sha256, what="", licence="", citation="", installed=where)
    monkeypatch.setitem(PUBLIC, "toy", one)
    return sha256


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("control", [b"odd", b"even"])
@pytest.mark.parametrize(("name", "mode"), [("data.tar.xz", "w:xz"), ("data.tar.gz/", "w:gz"), ("data.tar", "w")])
def test_fetch_unpacks_a_debian_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: bytes, name: str, mode: str
) -> None:
    package = deb(
        tar({f"./{HOME}/{file}": content for file, content in FILES.items()}, mode), name=name, control=control
    )
    offer(monkeypatch, package)
    put(tmp_path / "toy", {"toy.deb": package})  # downloaded before
    found = fetch("toy", tmp_path, sha256=None)
    assert found.paths == (tmp_path / "toy/toy" / HOME,)
    assert found.sha256 == hashlib.sha256(package).hexdigest()
    np.testing.assert_array_equal(images.read(found.paths[0]).inputs[:, 0], TRAIN)


@pytest.mark.parametrize(
    "package",
    [
        b"", b"!<arch>\n", deb(b"no tar"), deb(tar(FILES))[:-50], deb(tar(FILES), name="other"),
        deb(tar(FILES)).replace(b"`\n", b"xx"), deb(tar({"../../up": b""})),
    ],
)  # fmt: skip
def test_fetch_refuses_a_damaged_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: bytes) -> None:
    offer(monkeypatch, package)
    put(tmp_path / "toy", {"toy.deb": package})
    with pytest.raises(DataError, match=r"on unpacking; wanted an archive; delete it"):
        fetch("toy", tmp_path, sha256=None)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["toy.deb"]


def test_fetch_takes_the_installed_package_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = put(tmp_path / "usr", FILES)
    sha256 = offer(monkeypatch, b"package", installed)
    found = fetch("toy", tmp_path / "downloads", sha256=None)
    assert f"taken from {installed}, where the Debian package is installed; nothing" in capsys.readouterr().err
    assert found == public.FetchResult((tmp_path / "downloads/toy/toy",), sha256)
    np.testing.assert_array_equal(images.read(found.paths[0]).inputs[:, 0], TRAIN)
    (installed / "train-labels-idx1-ubyte.gz").unlink()
    assert fetch("toy", tmp_path / "downloads", sha256=sha256.upper()) == found  # what was taken stays
    assert not capsys.readouterr().err
    put(found.paths[0], {"train-labels-idx1-ubyte.gz": b"other"})
    with pytest.raises(DataError, match="other files than were put there; wanted delete it"):
        fetch("toy", tmp_path / "downloads", sha256=None)


def test_fetch_takes_no_installed_package_of_other_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = put(tmp_path / "usr", FILES | {"train-labels-idx1-ubyte.gz": b"other"})
    offer(monkeypatch, b"package", installed)
    with pytest.raises(DataError, match="wanted a network"):
        fetch("toy", tmp_path / "downloads", sha256=None)
    put(installed, FILES)
    with pytest.raises(DataError, match="wanted a network"):  # the caller wants another package
        fetch("toy", tmp_path / "downloads", sha256="0" * 64)


def test_fashion_mnist_is_a_debian_package_with_a_hash() -> None:
    one = PUBLIC["fashion_mnist"]
    assert list(one.files) == ["fashion_mnist.deb"]
    assert one.sha256 is not None
    assert one.installed is not None
    assert one.installed[0] == Path("/usr/share/datasets/fashion-mnist")
