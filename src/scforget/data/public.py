"""Public data sets: where they lie, and how to fetch them over a line that may drop."""

from __future__ import annotations

import hashlib
import io
import lzma
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
_AR, _AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class PublicSet:
    """A public data set: where it lies, and what a user of it must know.

    Attributes
    ----------
    files
        Name on disk -> address. Archives (``.tar.gz``, ``.zip``, ``.deb``) are unpacked.
    sha256
        What ``fetch`` must find when its caller names no hash; ``None`` where nobody has published one.
    what, licence, citation
        For people.
    installed
        Where the Debian package that is downloaded would put its files, and the hash of those (as ``FetchResult`` has
        it of several): if they are there already, nothing is downloaded.
    """

    files: Mapping[str, str]
    sha256: str | None
    what: str
    licence: str
    citation: str
    installed: tuple[Path, str] | None = None


@dataclass(frozen=True)
class FetchResult:
    """What ``fetch`` brought.

    Attributes
    ----------
    paths
        The folders that hold a matrix or images, then the files that are no archive: what ``join`` takes, of cells.
    sha256
        Of the one downloaded file; of several, of their ``sha256sum`` lines (hash, two spaces, name) in order.
    """

    paths: tuple[Path, ...]
    sha256: str


_TENX = "https://cf.10xgenomics.com/samples/cell-exp/1.1.0"
_FIGSHARE = "https://ndownloader.figshare.com/files"
_DEBIAN = "https://deb.debian.org/debian/pool/main/d/dataset-fashion-mnist"
#: Public sets of images; the others are of cells.
IMAGE_SETS = ("fashion_mnist",)

PUBLIC: Mapping[str, PublicSet] = {
    "fashion_mnist": PublicSet(
        # Debian's package of it, whose hash Debian publishes and signs.
        files={"fashion_mnist.deb": f"{_DEBIAN}/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"},
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        what="70,000 grey images of clothes, 28 x 28 pixels, 10 classes",
        licence="MIT",
        citation="Xiao, Rasul & Vollgraf, Fashion-MNIST (2017), arXiv:1708.07747; as packaged by Debian",
        installed=(
            Path("/usr/share/datasets/fashion-mnist"),
            "f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
        ),
    ),
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
    if (copied := _copy_installed(public, home, sha256)) is not None:
        return copied
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
    return FetchResult((*_found(home), *(file for file in files if _stem(file) is None)), found)


def _found(home: Path) -> list[Path]:
    """Folders that hold a matrix or images."""
    return sorted({file.parent for pattern in ("matrix.mtx*", "*-idx3-ubyte*") for file in home.rglob(pattern)})


def _copy_installed(public: PublicSet, home: Path, sha256: str | None) -> FetchResult | None:
    """Take a set from the Debian package that would be downloaded, if that is installed and whole; else ``None``."""
    if public.installed is None or public.sha256 is None or (sha256 or public.sha256).lower() != public.sha256:
        return None
    (folder, wanted), (file,) = public.installed, public.files
    target = home / str(_stem(home / file))
    if (home / file).exists():
        return None
    if target.exists():  # taken before
        if not target.is_dir() or _digest(sorted(target.iterdir())) != wanted:
            raise DataError(str(target), "other files than were put there", "delete it to fetch them again")
        return FetchResult((target,), public.sha256)
    if not folder.is_dir() or _digest(sorted(folder.iterdir())) != wanted:
        return None
    half = target.with_name(f"{target.name}.unpacking")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(folder, half)
    half.rename(target)
    print(f"taken from {folder}, where the Debian package is installed; nothing was downloaded", file=sys.stderr)
    return FetchResult((target,), public.sha256)


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
    endings = (ending for ending in (".tar.gz", ".zip", ".deb") if file.name.endswith(ending))
    return next((file.name.removesuffix(ending) for ending in endings), None)


_UNPACKING = tarfile.TarError, zipfile.BadZipFile, shutil.ReadError, zlib.error, lzma.LZMAError, EOFError


def _data_of(file: Path) -> bytes:
    """Return the archive of files in a Debian package, which is an ``ar`` archive of three (deb(5), ar(5))."""
    content, at = file.read_bytes(), len(_AR)
    if not content.startswith(_AR):
        raise shutil.ReadError(f"{file} is no Debian package")
    while at + _AR_HEADER <= len(content):
        header = content[at : at + _AR_HEADER]
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), header[48:58].strip()
        if header[58:] != b"`\n" or not size.isdigit():
            break
        start = at + _AR_HEADER
        if name.startswith("data.tar") and start + int(size) <= len(content):
            return content[start : start + int(size)]
        at = start + int(size) + int(size) % 2  # members begin at even places
    raise shutil.ReadError(f"{file} holds no files")


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Extract files and folders, refusing whatever leads out of the folder."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    for member in tar:  # Python before 3.11.4 has no filter
        parts = Path(member.name).parts
        if Path(member.name).is_absolute() or ".." in parts or not (member.isfile() or member.isdir()):
            raise tarfile.ExtractError(f"{member.name} leads out of the folder, or is no file")
        tar.extract(member, folder, set_attrs=False)


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
        elif file.suffix == ".deb":
            with tarfile.open(fileobj=io.BytesIO(_data_of(file))) as tar:
                _extract(tar, half)
        else:
            with tarfile.open(file) as tar:
                _extract(tar, half)
    except (*_UNPACKING, OSError) as error:
        shutil.rmtree(half, ignore_errors=True)
        found = f"{type(error).__name__} on unpacking"
        raise DataError(str(file), found, "an archive; delete it to download it again") from error
    half.rename(file.parent / stem)
