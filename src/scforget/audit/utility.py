"""What a model is still good for: agreement of its latent space with known labels, and of its counts with the data.

Functions of arrays: the caller encodes and decodes. Small groups are common (a forgotten cluster of 11 cells), so a
number that cannot be computed is left out of the result; only an empty input is an error.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from scforget.arrays import FloatArray
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import derive, numpy_generator

FOLDS = 5
# The silhouette needs all pairs of cells; 5,000 seeded ones are what P0 used.
SILHOUETTE_CELLS = 5000
# UMAP lays out a graph of neighbours; with fewer cells there is none.
EMBEDDED_CELLS = 4
# A range below this share of the values is rounding.
ROUNDING = 1e-12


def _random_state(seed: int, *names: object) -> int:
    """Return a stream's seed as scikit-learn takes it: 32 bits."""
    return derive(seed, *names) % 2**32


def _not_empty(name: str, array: npt.ArrayLike) -> FloatArray:
    values = np.asarray(array, dtype=np.float64)
    if values.size == 0:
        raise EmptyGroupError(name, f"shape {values.shape}", "at least one cell")
    return values


def _silhouette(mu: FloatArray, labels: npt.NDArray[np.object_], seed: int) -> float | None:
    from sklearn.metrics import silhouette_score

    if len(mu) > SILHOUETTE_CELLS:
        kept = numpy_generator(seed, "silhouette").choice(len(mu), SILHOUETTE_CELLS, replace=False)
        mu, labels = mu[kept], labels[kept]
    if not 2 <= len(np.unique(labels)) < len(mu):
        return None
    return float(silhouette_score(mu, labels))


def latent_agreement(mu: npt.ArrayLike, labels: npt.ArrayLike, *, seed: int) -> dict[str, float]:
    """Measure how far known groups of cells stand apart in latent space.

    Parameters
    ----------
    mu : ``[N, Z]``
        Latent means.
    labels : ``[N]``
        Clusters or cell types, C different ones.
    seed
        Of K-means and of the silhouette's subsample.

    Returns
    -------
    dict
        ``ari``: adjusted Rand index of K-means (k = C, best of 10 starts) against the labels, at most 1, 0 by chance.
        ``silhouette`` in [−1, 1] of the labels. Left out with fewer than 2 labels, or as many as cells.

    Raises
    ------
    EmptyGroupError
        Without cells.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import adjusted_rand_score

    points, names = _not_empty("latent means", mu), np.asarray(labels).astype(str).astype(object)
    count = len(np.unique(names))
    if not 2 <= count < len(points):
        return {}
    with warnings.catch_warnings():
        # A collapsed posterior has fewer different points than clusters: that is a finding, and ARI shows it.
        warnings.filterwarnings("ignore", category=ConvergenceWarning, message="Number of distinct clusters")
        means = KMeans(count, n_init=10, random_state=_random_state(seed, "kmeans")).fit(points)
    result = {"ari": float(adjusted_rand_score(names, means.labels_))}
    silhouette = _silhouette(points, names, seed)
    return result if silhouette is None else {**result, "silhouette": silhouette}


def cell_type_accuracy(mu: npt.ArrayLike, labels: npt.ArrayLike, *, seed: int) -> dict[str, float]:
    """How well a linear classifier tells cell types from the latent means, on cells that it was not fitted on.

    Parameters
    ----------
    mu : ``[N, Z]``
        Latent means; standardised within each fold.
    labels : ``[N]``
        Cell types; those with fewer than 5 cells cannot be in every fold and are left out.
    seed
        Of the folds.

    Returns
    -------
    dict
        ``cell_type_accuracy`` in [0, 1] over the cells of the kept types, by stratified 5-fold cross-validation of a
        logistic regression; left out with fewer than 2 such types. ``cell_types_left_out``: how many types were.

    Raises
    ------
    EmptyGroupError
        Without cells.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    points, names = _not_empty("latent means", mu), np.asarray(labels).astype(str)
    types, which, counts = np.unique(names, return_inverse=True, return_counts=True)
    kept = counts[which] >= FOLDS
    left_out = {"cell_types_left_out": float((counts < FOLDS).sum())}
    if len(types) - left_out["cell_types_left_out"] < 2:
        return left_out
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=_random_state(seed, "cell_type_accuracy"))
    predicted = cross_val_predict(classifier, points[kept], names[kept], cv=folds)
    return {"cell_type_accuracy": float((predicted == names[kept]).mean()), **left_out}


def _varies(columns: FloatArray) -> npt.NDArray[np.bool_]:
    # By range, not by variance: the mean of equal floats need not be that float.
    return np.ptp(columns, axis=0) > ROUNDING * np.abs(columns).max(axis=0)


def _pearson(one: FloatArray, two: FloatArray) -> FloatArray:
    """Pearson r of each column: 0 where ``two`` is constant, NaN where ``one`` is."""
    r = np.where(_varies(one), 0.0, np.nan)
    both = _varies(one) & _varies(two)
    x, y = one[:, both] - one[:, both].mean(axis=0), two[:, both] - two[:, both].mean(axis=0)
    r[both] = (x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return r


def marker_correlation(counts_log: npt.ArrayLike, decoded_log: npt.ArrayLike) -> float:
    """Mean over marker genes of the Pearson correlation between observed and decoded expression.

    Parameters
    ----------
    counts_log : ``[N, M]``
        Observed log1p expression of the M markers.
    decoded_log : ``[N, M]``
        Decoded with the cell's **true library**, on the same scale.

    Returns
    -------
    float
        In [−1, 1]; over the genes that vary among these cells, where a constant prediction counts as 0: leaving it out
        would reward a collapsed model. NaN if no gene varies.

    Raises
    ------
    EmptyGroupError
        Without cells or genes.
    DataError
        If the shapes differ.
    """
    observed, decoded = _not_empty("marker expression", counts_log), _not_empty("decoded markers", decoded_log)
    if observed.shape != decoded.shape:
        raise DataError("marker expression and its decoding", f"{observed.shape}, {decoded.shape}", "one shape")
    r = _pearson(observed, decoded)
    return float("nan") if np.isnan(r).all() else float(np.nanmean(r))


def posterior_predictive(
    counts: npt.ArrayLike, expected_mean: npt.ArrayLike, expected_zeros: npt.ArrayLike
) -> dict[str, float]:
    """Check whether data that the model would make look like the real ones, gene by gene.

    Parameters
    ----------
    counts : ``[N, G]``
        Observed counts.
    expected_mean : ``[G]``
        Each gene's mean count over the same cells under the model (in closed form, or of samples).
    expected_zeros : ``[G]``
        Each gene's share of zeros under the model, in [0, 1].

    Returns
    -------
    dict
        ``mean_r``: Pearson r over genes of the log1p means, as raw means are ruled by a few genes. ``zero_fraction_r``:
        of the shares of zeros. Each left out if it does not vary over genes.

    Raises
    ------
    EmptyGroupError
        Without cells or genes.
    DataError
        If the numbers of genes differ.
    """
    data = _not_empty("counts", counts)
    model = [np.asarray(values, dtype=np.float64) for values in (expected_mean, expected_zeros)]
    if any(values.shape != data.shape[1:] for values in model):
        raise DataError("genes of a predictive check", [v.shape for v in model], f"{data.shape[1:]} as in the counts")
    pairs = {
        "mean_r": (np.log1p(data.mean(axis=0)), np.log1p(model[0])),
        "zero_fraction_r": ((data == 0).mean(axis=0), model[1]),
    }
    result = {name: float(_pearson(one[:, None], two[:, None])[0]) for name, (one, two) in pairs.items()}
    return {name: r for name, r in result.items() if not np.isnan(r)}


def embedding(mu: npt.ArrayLike, *, seed: int) -> FloatArray:
    """Lay the cells out in the plane for a picture; no number is computed from it.

    Parameters
    ----------
    mu : ``[N, Z]``
        Latent means, N >= 4.
    seed
        Of the layout, which is computed on one thread and so is the same every time.

    Returns
    -------
    ``[N, 2]``

    Raises
    ------
    EmptyGroupError
        With fewer than 4 cells.

    Notes
    -----
    UMAP (McInnes et al. 2018), 15 neighbours, minimum distance 0.1, as P0.
    """
    points = _not_empty("latent means", mu)
    if len(points) < EMBEDDED_CELLS:
        raise EmptyGroupError("cells of an embedding", len(points), f"at least {EMBEDDED_CELLS}")
    with warnings.catch_warnings():
        # umap looks for a Tensorflow that it does not need, and says so at import.
        warnings.filterwarnings("ignore", category=ImportWarning, message="Tensorflow not installed")
        from umap import UMAP
    with warnings.catch_warnings():
        # One thread is what a seed asks for; umap repeats it as a warning.
        warnings.filterwarnings("ignore", category=UserWarning, message="n_jobs value")
        layout = UMAP(
            n_neighbors=min(15, len(points) - 1),
            min_dist=0.1,
            n_jobs=1,
            random_state=_random_state(seed, "embedding"),
        ).fit_transform(points)
    return np.asarray(layout, dtype=np.float64)
