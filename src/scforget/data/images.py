"""Image data sets: reading them from any of the usual layouts, dropping what is there twice, and the bundled digits."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from scforget.arrays import BoolArray, IntArray
from scforget.data import image_files, image_folders
from scforget.data.image_files import Found, one_line
from scforget.errors import DataError

__all__ = ["Images", "Unique", "read", "recognises", "without_duplicates", "write_digits"]

WANTED = (
    "IDX files (train-images-idx3-ubyte[.gz], …), CIFAR-10's python batches, one .npz, or .png/.jpg pictures in class "
    "folders, in one .zip, or named by a metadata.csv"
)


@dataclass(frozen=True)
class Images:
    """Images and what is known of them.

    Attributes
    ----------
    inputs : ``[N, channels, H, W]`` uint8
        One channel is grey, three are red, green and blue.
    labels, identities : ``[N]`` str
        Class; whose image it is, ``''`` where nobody knows.
    names : ``[N]`` str
        Unique.
    test : ``[N]`` bool
        Whether the set's makers keep it for testing.
    """

    inputs: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.str_]
    identities: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    test: BoolArray

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def obs(self) -> pd.DataFrame:
        """N rows by name, with ``label``, ``donor`` (the identity) and ``test``: what splits are made of."""
        columns = {"label": self.labels.astype(object), "donor": self.identities.astype(object), "test": self.test}
        return pd.DataFrame(columns, index=pd.Index(self.names.astype(object)))

    def take(self, items: IntArray | BoolArray) -> Images:
        """Return some of them, by index or by a mask."""
        return Images(
            self.inputs[items], self.labels[items], self.identities[items], self.names[items], self.test[items]
        )


def recognises(path: Path) -> bool:
    """Whether ``path`` looks like an image set: what :func:`read` would try to read."""
    return image_files.kind(path) is not None


def read(path: Path) -> Images:
    """Read an image set.

    Parameters
    ----------
    path
        A folder, a ``.zip`` or an ``.npz``. A folder holds one of: MNIST's IDX files, plain or ``.gz`` (Fashion-MNIST's
        classes get their names); CIFAR-10's python batches; one ``.npz`` (arrays ``images`` uint8 ``[N, H, W]``,
        ``[N, H, W, channels]`` or ``[N, channels, H, W]``, ``labels``, and optional ``identities``, ``names``,
        ``test``); or pictures as ``CLASS/x.png``, or ``train/CLASS/x.png`` and ``test/CLASS/x.png``, or the same in one
        ``.zip``. A ``metadata.csv`` beside pictures has a column ``file`` and optional ``label``, ``identity`` and
        ``split`` (``train`` or ``test``); where a cell of it is empty the folder's name counts.

    Returns
    -------
    Images
        In the order of the files; pictures in that of their names. Pixels as stored: no rotation by EXIF.

    Raises
    ------
    DataError
        If there is nothing to read, a file is damaged, images differ in size, or a name, a label or a split is missing
        or wrong; see :func:`check`.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(str(path), "no such file or folder", WANTED)
    reader = {
        "idx": image_files.read_idx, "cifar": image_files.read_cifar, "npz": image_files.read_npz,
        "pictures": image_folders.read_pictures,
    }.get(image_files.kind(path) or "")  # fmt: skip
    if reader is None:
        raise DataError(str(path), "nothing that is an image set", WANTED)
    found: Found = reader(path)
    images = Images(
        inputs=found.inputs,
        labels=_texts(path, "labels", found.labels, len(found.inputs)),
        identities=_texts(path, "identities", found.identities, len(found.inputs)),
        names=_texts(path, "names", found.names, len(found.inputs)),
        test=np.asarray(found.test, dtype=bool),
    )
    check(images, str(path))
    return images


def _texts(path: Path, what: str, values: Sequence[object], n: int) -> npt.NDArray[np.str_]:
    if len(values) != n:
        raise DataError(str(path), f"{len(values)} {what} for {n} images", "one each")
    return np.array([str(value) for value in values], dtype=np.str_)


def check(images: Images, what: str) -> None:
    """Refuse images that no classifier can be trained on.

    Raises
    ------
    DataError
        Without a training image or a pixel, with an image without a label, fewer than two classes, a class that only
        test images have, or two images of one name.
    """
    if not len(images) or images.test.all():
        raise DataError(what, f"{len(images)} images, none of them to train on", "training images")
    if 0 in images.inputs.shape:
        raise DataError(what, f"images of shape {images.inputs.shape[1:]}", "at least one pixel")
    if (images.labels == "").any():
        first = one_line(images.names[images.labels == ""][0])
        raise DataError(what, f"no label of {first!r}", "a label for every image")
    known = set(images.labels[~images.test].tolist())
    if len(known) < 2:
        raise DataError(what, f"a single class, {one_line(min(known))!r}", "two or more")
    if strange := sorted(set(images.labels[images.test].tolist()) - known):
        raise DataError(what, f"class {one_line(strange[0])!r} among the test images only", "training images of it")
    names, times = np.unique(images.names, return_counts=True)
    if (times > 1).any():
        raise DataError(what, f"two images named {one_line(names[times > 1][0])!r}", "unique names")


class Unique(NamedTuple):
    """Images, each once; ``repeats`` were dropped as repetitions, ``disputed`` as images of more than one person."""

    images: Images
    repeats: int
    disputed: int


def without_duplicates(images: Images) -> Unique:
    """Drop exact duplicates, so that an image that is forgotten is not kept under another name.

    Of images with the same pixels the first stays, with the identity that any of them has. If they have two or more
    identities all of them go: nobody can tell whose image it is, and to keep it as the one's would leave the other's
    in the training after a request to forget.

    Returns
    -------
    Unique
        In the order they were in.
    """
    flat = np.ascontiguousarray(images.inputs.reshape(len(images), -1))
    rows = flat.view(np.dtype((np.void, flat.shape[1]))).reshape(-1)
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    known = np.flatnonzero(images.identities != "")
    pairs = pd.DataFrame({"image": which[known], "identity": images.identities[known]}).drop_duplicates()
    persons = np.bincount(pairs["image"].to_numpy(), minlength=len(first))
    identities = images.identities.astype(object)
    owner = pairs.drop_duplicates("image")
    identities[first[owner["image"].to_numpy()]] = owner["identity"].to_numpy()
    kept = np.sort(first[persons <= 1])
    disputed = int((persons[which] > 1).sum())
    whole = replace(images, identities=identities.astype(np.str_))
    return Unique(whole.take(kept), len(images) - len(kept) - disputed, disputed)


def write_digits(destination: Path) -> None:
    """Make the bundled set ``digits``: 1,797 handwritten digits of 8×8 grey pixels, the same bytes each time.

    Parameters
    ----------
    destination
        The folder to write ``images.npz`` and ``ATTRIBUTION.md`` into; made if need be.

    Raises
    ------
    DataError
        scikit-learn's file is not what it was: a value that is no whole number of 0 to 16.
    """
    from sklearn.datasets import load_digits

    values, digits = load_digits(return_X_y=True)
    if values.shape != (1797, 64) or not np.isin(values, range(17)).all():
        raise DataError("sklearn.datasets.load_digits", f"other values, {values.shape}", "1797 x 64 of 0 to 16")
    pixels = np.rint(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    destination.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(destination / "images.npz", "w") as archive:  # NumPy's own bytes depend on Python's version
        for name, array in (("images", pixels), ("labels", digits.astype(np.int64))):
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())  # dated 1980
    (destination / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")


ATTRIBUTION = """\
# digits: where these images come from

- **Images**: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository
  (1998), [doi:10.24432/C50P49](https://doi.org/10.24432/C50P49), licensed under
  [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). They are the test part of that set, 1,797 images; its
  13 writers are not told apart.
- **As distributed** with [scikit-learn](https://scikit-learn.org) (BSD-3-Clause), `sklearn.datasets.load_digits()`.
- **What was changed here**: the values 0 to 16 were multiplied by 255/16 and rounded, to be bytes, and written as
  `images.npz`: `images` uint8 `[1797, 8, 8]`, `labels` int64 `[1797]`.
"""
