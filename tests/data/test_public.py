"""Fetching public sets over a network that fails (a local server, never a real one), and joining their runs."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scforget.data import public
from scforget.data.sources import PUBLIC, PublicSet, fetch, join
from scforget.errors import DataError


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; ranges can be off, and ``drops`` replies break off half-way."""

    files: dict[str, bytes]
    ranges: bool
    drops: int
    asked: list[str | None]

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range")
        cls.asked.append(wanted)
        if self.path not in cls.files:
            self.send_error(404)
            return
        content = cls.files[self.path]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and cls.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.drops:
            cls.drops -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[tuple[type[Server], str]]:
    class Mine(Server):
        files: dict[str, bytes] = {}  # noqa: RUF012
        ranges, drops = True, 0
        asked: list[str | None] = []  # noqa: RUF012

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Mine, f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    thread.join()
    running.server_close()


def offer(monkeypatch, files: dict[str, str], sha256: str | None = None) -> None:
    monkeypatch.setitem(PUBLIC, "toy", PublicSet(files=files, sha256=sha256, what="", licence="", citation=""))


def packed(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.add(folder, arcname="filtered/hg19")
    return out.getvalue()


BIG = np.random.default_rng(0).bytes(500_000)


def test_fetch_downloads_unpacks_and_names_the_hash(tiny, tmp_path, server, monkeypatch, write_10x, same_counts):
    handler, address = server
    content = packed(write_10x(tiny, tmp_path / "made", legacy=True))
    handler.files["/x"] = content
    offer(monkeypatch, {"toy.tar.gz": f"{address}/x"})
    result = fetch("toy", tmp_path / "downloads", sha256=None)
    assert result.sha256 == hashlib.sha256(content).hexdigest()
    assert result.paths == (tmp_path / "downloads/toy/toy/filtered/hg19",)
    assert same_counts(join(result.paths), tiny)
    # What is there is not downloaded again.
    assert fetch("toy", tmp_path / "downloads", sha256=result.sha256) == result
    assert handler.asked == [None]


def test_fetch_continues_a_dropped_download(tmp_path, server, monkeypatch):
    handler, address = server
    handler.files["/x"], handler.drops = BIG, 1
    offer(monkeypatch, {"toy.bin": f"{address}/x"})
    with pytest.raises(DataError, match="is kept and continued") as caught:
        fetch("toy", tmp_path, sha256=None)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    part = tmp_path / "toy/toy.bin.part"
    size = part.stat().st_size
    assert 0 < size < len(BIG)
    assert f"({size} bytes)" in str(caught.value)
    result = fetch("toy", tmp_path, sha256=hashlib.sha256(BIG).hexdigest())
    assert handler.asked == [None, f"bytes={size}-"]
    assert result.paths[0].read_bytes() == BIG
    assert not part.exists()


def test_fetch_starts_anew_where_the_server_knows_no_ranges(tmp_path, server, monkeypatch):
    handler, address = server
    handler.files["/x"], handler.drops, handler.ranges = BIG, 1, False
    offer(monkeypatch, {"toy.bin": f"{address}/x"})
    with pytest.raises(DataError):
        fetch("toy", tmp_path, sha256=None)
    assert fetch("toy", tmp_path, sha256=None).paths[0].read_bytes() == BIG


def test_fetch_starts_anew_where_the_part_is_longer_than_the_file(tmp_path, server, monkeypatch):
    handler, address = server
    handler.files["/x"] = BIG
    offer(monkeypatch, {"toy.bin": f"{address}/x"})
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/toy.bin.part").write_bytes(BIG + b"more")
    assert fetch("toy", tmp_path, sha256=None).paths[0].read_bytes() == BIG


def test_fetch_refuses_another_hash_and_unpacks_nothing(tiny, tmp_path, server, monkeypatch, write_10x):
    handler, address = server
    handler.files["/x"] = packed(write_10x(tiny, tmp_path / "made", legacy=True))
    offer(monkeypatch, {"toy.tar.gz": f"{address}/x"}, sha256="0" * 64)
    with pytest.raises(DataError, match=f"wanted {'0' * 64}"):
        fetch("toy", tmp_path, sha256=None)
    assert not (tmp_path / "toy/toy").exists()
    right = hashlib.sha256(handler.files["/x"]).hexdigest()
    assert fetch("toy", tmp_path, sha256=right.upper()).sha256 == right  # the caller's hash goes before the listed one


def test_fetch_hashes_several_files_as_sha256sum_lists_them(tmp_path, server, monkeypatch):
    handler, address = server
    handler.files.update({"/x": b"one", "/y": b"two"})
    offer(monkeypatch, {"b.csv": f"{address}/x", "a.csv": f"{address}/y"})
    lines = f"{hashlib.sha256(b'one').hexdigest()}  b.csv\n{hashlib.sha256(b'two').hexdigest()}  a.csv\n"
    assert fetch("toy", tmp_path, sha256=None).sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_fetch_says_that_there_is_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    offer(monkeypatch, {"toy.bin": "http://127.0.0.1:9/x"})
    with pytest.raises(DataError, match=r"no \(whole\) answer: ConnectionError; wanted a network") as caught:
        fetch("toy", tmp_path, sha256=None)
    assert "kept" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fetch_names_the_status_of_a_refusal(tmp_path, server, monkeypatch):
    offer(monkeypatch, {"toy.bin": f"{server[1]}/gone"})
    with pytest.raises(DataError, match="HTTP 404"):
        fetch("toy", tmp_path, sha256=None)
    assert not list((tmp_path / "toy").iterdir())


@pytest.mark.parametrize("name", ["toy.tar.gz", "toy.zip", "toy.deb"])
def test_fetch_refuses_a_damaged_archive(tmp_path, server, monkeypatch, name):
    handler, address = server
    handler.files["/x"] = b"no archive"
    offer(monkeypatch, {name: f"{address}/x"})
    with pytest.raises(DataError, match="delete it to download it again"):
        fetch("toy", tmp_path, sha256=None)
    assert [file.name for file in (tmp_path / "toy").iterdir()] == [name]


def test_fetch_refuses_an_archive_that_leads_out_of_its_folder(tmp_path, server, monkeypatch):
    handler, address = server
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
    handler.files["/x"] = out.getvalue()
    offer(monkeypatch, {"toy.tar.gz": f"{address}/x"})
    with pytest.raises(DataError, match=r"OutsideDestinationError|ExtractError"):
        fetch("toy", tmp_path / "in", sha256=None)
    assert not list(tmp_path.rglob("escaped"))


def test_fetch_names_the_known_sets_for_an_unknown_one(tmp_path):
    with pytest.raises(DataError, match="'pbmc4k'; wanted one of fashion_mnist, pbmc33k, pbmc3k, tabula_muris"):
        fetch("pbmc4k", tmp_path, sha256=None)


def test_public_sets_say_what_they_are():
    assert set(PUBLIC) == {"pbmc3k", "pbmc33k", "tabula_muris", *public.IMAGE_SETS}
    for name, one in PUBLIC.items():
        assert all((one.what, one.licence, one.citation)), name
        assert all(url.startswith("https://") for url in one.files.values())
        assert any(public._stem(Path(file)) for file in one.files)


# join


def test_join_reads_runs_as_tabula_muris_lays_them_out(tiny, tmp_path, server, monkeypatch, write_10x):
    handler, address = server
    runs = {"Lung-10X_P7_8": tiny[:100], "Heart_and_Aorta-10X_P7_4": tiny[100:]}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for run, cells in runs.items():
            part = cells.copy()
            part.obs_names = [f"{i:04d}-1" for i in range(part.n_obs)]
            for file in write_10x(part, tmp_path / run, legacy=True).iterdir():
                archive.write(file, f"droplet/{run}/{file.name}")
                archive.writestr(f"__MACOSX/droplet/{run}/._{file.name}", "junk")
    named = ["10X_P7_8_0003", "10X_P7_4_0000", "10X_P7_4_0007", "10X_P9_9_0000"]
    notes = pd.DataFrame({"cell": named, "cell_ontology_class": ["B", "T", None, "B"], "tissue": "x"})
    handler.files.update({"/x": zipped.getvalue(), "/y": notes.to_csv(index=False).encode()})
    offer(monkeypatch, {"droplet.zip": f"{address}/x", "notes.csv": f"{address}/y"})
    cells = join(fetch("toy", tmp_path / "downloads", sha256=None).paths)
    assert sorted(cells.obs_names) == sorted(named[:3])
    lung = cells["10X_P7_8_0003"]
    assert lung.obs.iloc[0][["run", "tissue", "channel", "cell_ontology_class"]].tolist() == [
        "Lung-10X_P7_8",
        "Lung",
        "10X_P7_8",
        "B",
    ]
    np.testing.assert_array_equal(lung.X.toarray(), tiny[3].X.toarray())
    np.testing.assert_array_equal(cells["10X_P7_4_0007"].X.toarray(), tiny[107].X.toarray())
    assert cells.X.dtype == np.int32


def test_join_refuses_annotations_of_other_cells(tiny, tmp_path, write_10x):
    folders = [write_10x(tiny, tmp_path / name, legacy=True) for name in ("A-1", "B-2")]
    (tmp_path / "notes.csv").write_text("cell,kind\nx,1\n")
    with pytest.raises(DataError, match="no cell of the runs"):
        join([*folders, tmp_path / "notes.csv"])


def test_join_refuses_nothing_and_repeated_names(tiny, tmp_path, write_10x):
    with pytest.raises(DataError, match="no 10x folder"):
        join([])
    folders = [write_10x(tiny, tmp_path / name, legacy=True) for name in ("A-1", "B-1")]
    with pytest.raises(DataError, match="more than once"):
        join(folders)
