"""Public data sets: where they lie, and how to fetch them over a line that may drop."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scforget.errors import DataError

CHUNK = 2**16


@dataclass(frozen=True)
class PublicSet:
    """A public data set: where it lies, and what a user of it must know.

    Attributes
    ----------
    files
        Name on disk -> address. Archives (``.tar.gz``, ``.zip``) are unpacked.
    sha256
        What ``fetch`` must find when its caller names no hash; ``None`` where nobody has published one.
    what, licence, citation
        For people.
    """

    files: Mapping[str, str]
    sha256: str | None
    what: str
    licence: str
    citation: str


@dataclass(frozen=True)
class FetchResult:
    """What ``fetch`` brought.

    Attributes
    ----------
    paths
        The folders that hold a matrix, then the files that are no archive: what ``join`` takes.
    sha256
        Of the one downloaded file; of several, of their ``sha256sum`` lines (hash, two spaces, name) in order.
    """

    paths: tuple[Path, ...]
    sha256: str


_TENX = "https://cf.10xgenomics.com/samples/cell-exp/1.1.0"
_FIGSHARE = "https://ndownloader.figshare.com/files"

PUBLIC: Mapping[str, PublicSet] = {
    "pbmc3k": PublicSet(
        files={"pbmc3k.tar.gz": f"{_TENX}/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz"},
        sha256=None,
        what="2,700 blood cells of one healthy donor",
        licence="CC BY 4.0",
        citation="10x Genomics, 3k PBMCs from a Healthy Donor, Cell Ranger 1.1.0 (2016)",
    ),
    "pbmc33k": PublicSet(
        files={"pbmc33k.tar.gz": f"{_TENX}/pbmc33k/pbmc33k_filtered_gene_bc_matrices.tar.gz"},
        sha256=None,
        what="33,148 blood cells of one healthy donor",
        licence="CC BY 4.0",
        citation="10x Genomics, 33k PBMCs from a Healthy Donor, Cell Ranger 1.1.0 (2016)",
    ),
    "tabula_muris": PublicSet(
        # Article 5968960: 10x runs by tissue and channel, and the cell types of the paper.
        files={"droplet.zip": f"{_FIGSHARE}/10700167", "annotations_droplet.csv": f"{_FIGSHARE}/13088039"},
        sha256=None,
        what="mouse cells of 12 tissues and several animals, 28 droplet runs",
        licence="as stated at doi:10.6084/m9.figshare.5968960",
        citation="The Tabula Muris Consortium, Nature 562, 367-372 (2018), doi:10.1038/s41586-018-0590-4",
    ),
}


def fetch(name: str, folder: Path, *, sha256: str | None) -> FetchResult:
    """Download a public set into ``folder/name`` and unpack it; what is there already is not downloaded again.

    A dropped download leaves a ``.part`` file that the next call continues.

    Parameters
    ----------
    name
        A key of ``PUBLIC``.
    folder
        Where sets are kept, each in a folder of its own; made if need be.
    sha256
        The hash the download must have (see ``FetchResult``); ``None`` to take it as it comes and be told its hash.

    Returns
    -------
    FetchResult

    Raises
    ------
    DataError
        Unknown name, no network, another hash, or an archive that cannot be unpacked.
    """
    import pooch
    import requests

    if name not in PUBLIC:
        raise DataError("public set", repr(name), f"one of {', '.join(sorted(PUBLIC))}")
    public, home = PUBLIC[name], folder / name
    pooch.get_logger().setLevel("WARNING")  # the progress bar says it already
    files = []
    for file, url in public.files.items():
        part = home / f"{file}.part"
        try:
            got = pooch.retrieve(url, known_hash=None, fname=file, path=home, downloader=_Resuming(part))
        except requests.RequestException as error:
            kept = f"; {part} ({part.stat().st_size} bytes) is kept and continued" if part.exists() else ""
            raise DataError(
                url, _reason(error), f"a network that reaches it; run the same command again{kept}"
            ) from error
        files.append(Path(got))
    found, wanted = _digest(files), sha256 or public.sha256
    if wanted is not None and found != wanted.lower():
        raise DataError(f"public set {name}", f"sha256 {found}", f"{wanted}; delete {home} to download it again")
    for path in files:
        _unpack(path)
    matrices = sorted(file.parent for file in home.rglob("matrix.mtx*"))
    return FetchResult((*matrices, *(file for file in files if _stem(file) is None)), found)


def _reason(error: Exception) -> str:
    """Say in one line why a download failed."""
    reply = getattr(error, "response", None)
    return f"HTTP {reply.status_code}" if reply is not None else f"no (whole) answer: {type(error).__name__}"


@dataclass(frozen=True)
class _Resuming:
    """A downloader for pooch, which cannot continue by itself: the bytes gather in a file that outlives a failure.

    A server that ignores ``Range`` sends the whole file again (status 200), and the part is overwritten.
    """

    part: Path

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        import requests
        from rich.console import Console
        from rich.progress import Progress

        have = self.part.stat().st_size if self.part.exists() else 0
        # Compression on the way would make byte positions meaningless.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
            if reply.status_code == requests.codes.requested_range_not_satisfiable:
                # The part is not the beginning of the file that lies there now.
                self.part.unlink()
                return self(url, output_file, _pooch)
            reply.raise_for_status()
            have = have if reply.status_code == requests.codes.partial_content else 0
            total = have + int(reply.headers["Content-Length"]) if "Content-Length" in reply.headers else None
            bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
            with self.part.open("ab" if have else "wb") as out, bar:
                task = bar.add_task(self.part.stem, total=total, completed=have)
                for chunk in reply.iter_content(CHUNK):
                    out.write(chunk)
                    bar.advance(task, len(chunk))
        self.part.replace(output_file)
        return None


def _digest(files: Sequence[Path]) -> str:
    import pooch

    hashes = [pooch.file_hash(str(file)) for file in files]
    if len(hashes) == 1:
        return str(hashes[0])
    lines = "".join(f"{found}  {file.name}\n" for found, file in zip(hashes, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _stem(file: Path) -> str | None:
    """Return the name of an archive without its ending; ``None`` for other files."""
    endings = (ending for ending in (".tar.gz", ".zip") if file.name.endswith(ending))
    return next((file.name.removesuffix(ending) for ending in endings), None)


def _unpack(file: Path) -> None:
    """Unpack an archive beside itself, whole or not at all."""
    stem = _stem(file)
    if stem is None or (file.parent / stem).exists():
        return
    half = file.parent / f"{stem}.unpacking"
    shutil.rmtree(half, ignore_errors=True)
    try:
        if file.suffix == ".zip":
            shutil.unpack_archive(file, half)
        else:
            shutil.unpack_archive(file, half, filter="data")  # refuses paths that lead out of the folder
    except (tarfile.TarError, zipfile.BadZipFile, shutil.ReadError, zlib.error, EOFError, OSError) as error:
        shutil.rmtree(half, ignore_errors=True)
        found = f"{type(error).__name__} on unpacking"
        raise DataError(str(file), found, "an archive; delete it to download it again") from error
    half.rename(file.parent / stem)
