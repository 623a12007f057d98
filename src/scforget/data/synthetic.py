"""Counts whose truth is known: planted clusters, donors and marker genes under a negative binomial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from scipy import sparse

from scforget.arrays import FloatArray
from scforget.settings import Settings

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 1024


class SyntheticSettings(Settings):
    """The shape of a simulated data set.

    Attributes
    ----------
    cluster_sizes : each >= 1
        Cells of each planted cluster; their sum is N.
    n_genes : >= 1
        G.
    n_donors : >= 1
        Donors; each gives as many cells as the others (plus or minus one).
    library_median : > 0, counts
        Median of the expected total counts of a cell.
    library_sigma : >= 0
        Standard deviation of its logarithm.
    gene_sigma : >= 0
        Standard deviation of the logarithm of a gene's base expression; higher gives more zeros.
    donor_sigma : >= 0
        Standard deviation of the logarithm of a donor's effect on a gene.
    dispersion : > 0
        The inverse dispersion θ: variance = mean + mean² / θ.
    markers_per_cluster : >= 0
        Genes that only one cluster raises.
    marker_fold : > 0
        By which factor it raises them.
    """

    cluster_sizes: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    n_genes: Annotated[int, Field(ge=1)]
    n_donors: Annotated[int, Field(ge=1)]
    library_median: Annotated[float, Field(gt=0)]
    library_sigma: Annotated[float, Field(ge=0)]
    gene_sigma: Annotated[float, Field(ge=0)]
    donor_sigma: Annotated[float, Field(ge=0)]
    dispersion: Annotated[float, Field(gt=0)]
    markers_per_cluster: Annotated[int, Field(ge=0)]
    marker_fold: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _enough_genes(self) -> SyntheticSettings:
        wanted = self.markers_per_cluster * len(self.cluster_sizes)
        if wanted > self.n_genes:
            raise ValueError(f"markers of all clusters are {wanted} genes, but n_genes is {self.n_genes}")
        return self

    @property
    def n_cells(self) -> int:
        """N, the sum of the cluster sizes."""
        return sum(self.cluster_sizes)


PRESETS: Mapping[str, SyntheticSettings] = {
    # Cells, genes and clusters of PBMC-33k as published, and about its zeros and totals.
    "paper_shape": SyntheticSettings(
        cluster_sizes=[6882, 6233, 5567, 4521, 4050, 2277, 2141, 477, 309, 235, 221, 85, 55, 35],
        n_genes=2000,
        n_donors=8,
        library_median=400.0,
        library_sigma=0.4,
        gene_sigma=1.7,
        donor_sigma=0.1,
        dispersion=2.0,
        markers_per_cluster=40,
        marker_fold=6.0,
    ),
    "tiny": SyntheticSettings(
        cluster_sizes=[120, 80, 40],
        n_genes=60,
        n_donors=4,
        library_median=150.0,
        library_sigma=0.3,
        gene_sigma=0.8,
        donor_sigma=0.1,
        dispersion=5.0,
        markers_per_cluster=6,
        marker_fold=6.0,
    ),
}


def simulate(settings: SyntheticSettings, *, seed: int) -> AnnData:
    """Draw raw counts.

    Parameters
    ----------
    settings
        See `SyntheticSettings`.
    seed
        Any integer. Every part of the draw has a stream of its own, so the counts do not depend on memory or order.

    Returns
    -------
    AnnData
        ``X`` ``[N, G]`` CSR int32; ``obs``: ``cluster`` ("0" is the first size; cells are in random order), ``donor``
        and ``library`` (the expected total); ``var``: ``marker_of`` (a cluster, or "").

    Notes
    -----
    x_ig ~ NB(mean = l_i · ρ_g(c_i, d_i), inverse dispersion θ), drawn as Poisson(Gamma(θ, mean / θ)); l_i is lognormal;
    ρ(c, d) is base expression · marker factors of cluster c · effects of donor d, scaled to sum to 1 over genes.
    """
    from anndata import AnnData

    from scforget.seeding import numpy_generator  # brings torch, which the settings do without

    n_cells, n_genes = settings.n_cells, settings.n_genes
    order = numpy_generator(seed, "synthetic", "cells")
    clusters = order.permutation(np.repeat(np.arange(len(settings.cluster_sizes)), settings.cluster_sizes))
    donors = order.permutation(np.arange(n_cells) % settings.n_donors)
    noise = numpy_generator(seed, "synthetic", "library").standard_normal(n_cells)
    library = settings.library_median * np.exp(settings.library_sigma * noise)
    profiles, marker_of = _profiles(settings, numpy_generator(seed, "synthetic", "genes"))
    blocks = []
    for start in range(0, n_cells, BLOCK):
        rows = slice(start, start + BLOCK)
        draw = numpy_generator(seed, "synthetic", "counts", start)
        mean = library[rows, None] * profiles[clusters[rows], donors[rows]]
        rate = draw.gamma(settings.dispersion, mean / settings.dispersion)
        blocks.append(sparse.csr_matrix(draw.poisson(rate).astype(np.int32)))
    obs = pd.DataFrame(
        {
            "cluster": pd.Categorical(clusters.astype(str), categories=[str(c) for c in range(clusters.max() + 1)]),
            "donor": pd.Categorical([f"donor_{donor}" for donor in donors]),
            "library": library,
        },
        index=pd.Index([f"cell_{i:06d}" for i in range(n_cells)]),
    )
    var = pd.DataFrame({"marker_of": marker_of}, index=pd.Index([f"gene_{g:05d}" for g in range(n_genes)]))
    return AnnData(X=sparse.vstack(blocks, format="csr"), obs=obs, var=var)


def _profiles(settings: SyntheticSettings, draw: np.random.Generator) -> tuple[FloatArray, list[str]]:
    """Return expression ``[C, donors, G]`` that sums to 1 over genes, and the cluster that each gene marks."""
    n_clusters, n_genes = len(settings.cluster_sizes), settings.n_genes
    base = np.exp(settings.gene_sigma * draw.standard_normal(n_genes))
    marked = draw.permutation(n_genes)[: n_clusters * settings.markers_per_cluster].reshape(n_clusters, -1)
    factors = np.ones((n_clusters, n_genes))
    np.put_along_axis(factors, marked, settings.marker_fold, axis=1)
    effects = np.exp(settings.donor_sigma * draw.standard_normal((settings.n_donors, n_genes)))
    profiles = base * factors[:, None, :] * effects[None, :, :]
    marker_of = np.full(n_genes, "", dtype=object)
    for cluster, genes in enumerate(marked):
        marker_of[genes] = str(cluster)
    return profiles / profiles.sum(axis=2, keepdims=True), [str(name) for name in marker_of]
