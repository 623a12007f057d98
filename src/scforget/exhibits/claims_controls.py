"""Claims of the single-cell paper's section 5 about its controls, and about single entries of the Fisher diagonal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scforget.exhibits.measured import Claim, Estimate, Measured, Statement, dig, minus, shown, spread, within

#: "Persistent": half of what it was.
HALF = 0.5
#: A cosine "near zero".
NEAR_ZERO = 0.01
#: An AUC that is lower by less is "no improvement".
AUC_MARGIN = 0.05


def _ours(kind: str, group: str) -> Callable[[Measured], Estimate | None]:
    return lambda m: m.overlap(m.small if kind == "small" else kind, group)


def _compared(
    words: str, one: tuple[str, str], other: tuple[str, str], above: float
) -> Callable[[Measured], Statement]:  # fmt: skip
    """That one part (a kind of model and a group of it) overlaps more than so many times another."""

    def statement(m: Measured) -> Statement:
        names = {"small": m.small, "base": m.base}
        (kind, group), (base, its) = ((names.get(name, name), part) for name, part in (one, other))
        return Statement(words, m.against(kind, group, base, its), above=above)

    return statement


def _conditional(words: str, group: str, number: float) -> Claim:
    return Claim(
        f"Told the cluster, the decoder still overlaps: {words}",
        f"{number}",
        number,
        _ours("conditional", group),
        _compared("more than half of the plain VAE's", ("conditional", group), ("base", group), HALF),
        lambda m: f"plain VAE {shown(m.overlap(m.base, group))}",
    )


def _row(rows: object, **names: str) -> Mapping[str, Any] | None:
    """The first of some records that is of these names."""
    found = [row for row in rows if names.items() <= row.items()] if isinstance(rows, list) else []
    return found[0] if found else None


def _scrub(m: Measured) -> tuple[Estimate | None, Estimate | None]:
    """A learned attack's advantage on the scrubbed conditional VAE, and how much more that leaks than the plain one."""
    for method in ("fisher_scrub_published", "fisher_scrub"):
        own, pair = (
            dig(_row(dig(m.more, "conditional", part), variant="conditional", method=method), "learned_matched_knn")
            for part in ("rows", "contrasts")
        )
        if own and pair:
            words = f"{method}, learned attack, nearest cells as controls; cells and models"
            what = "AUC beyond the retrained models', difference"
            return (
                within(own["advantage"], own["advantage_interval"], words),
                within(pair["difference"], pair["interval"], what),
            )
    return None, None


def _feature(m: Measured, which: str) -> Estimate | None:
    """A subset's leak less that of the encoder's features."""
    found = dig(_row(dig(m.more, "features", m.request), features=which), "beyond_encoder")
    if found is None:
        return None
    return within(found["difference"], found["interval"], f"{which}: AUC beyond retrained, less the encoder's; models")


CONTROLS = [
    Claim(
        "Deep classifier: shared hidden layers", "0.262", 0.262, _ours("deep", "hidden"),
        _compared("shared layers above its class-specific output", ("deep", "hidden"), ("deep", "output"), 1),
        lambda m: f"of the VAE's size {shown(m.overlap('matched', 'hidden'))}",
    ),
    Claim(
        "Deep classifier: class-specific output", "0.010", 0.010, _ours("deep", "output"),
        _compared("shared layers above its class-specific output", ("deep", "hidden"), ("deep", "output"), 1),
        lambda m: f"of the VAE's size {shown(m.overlap('matched', 'output'))}; the VAE's shared output "
                  f"{shown(m.overlap(m.base, 'decoder_output'))}",
    ),
    Claim(
        "Overlap depends on shared against class-specific, not on size", "stated", None,
        lambda m: m.against(m.base, "global", "matched", "global"),
        _compared("VAE above a classifier of its size", ("base", "global"), ("matched", "global"), 1),
        lambda m: f"hidden layers of that classifier, shared as well, against the VAE's encoder: "
                  f"{shown(m.against('matched', 'hidden', m.base, 'encoder'))}",
    ),
    Claim(
        "A smaller latent space overlaps more", "0.846", 0.846, _ours("small", "global"),
        _compared("above the larger one", ("small", "global"), ("base", "global"), 1),
        lambda m: f"ratio {shown(m.against(m.small, 'global', m.base, 'global'))}; {m.small} against {m.base}; "
                  + m.by_its_estimator("global", m.small),
    ),
    Claim(
        "A smaller latent space concentrates overlap in the bottleneck", "0.858 against 0.291", 0.858,
        _ours("small", "bottleneck"),
        _compared("its bottleneck above the larger one's", ("small", "bottleneck"), ("base", "bottleneck"), 1),
        lambda m: f"ratio {shown(m.against(m.small, 'bottleneck', m.base, 'bottleneck'))}; "
                  + m.by_its_estimator("bottleneck", m.small),
    ),
    Claim(
        "Told the cluster, the cluster's columns do not overlap", "1.2e-8", 1.2e-8,
        _ours("conditional", "scale_condition"),
        lambda m: Statement("near zero", m.overlap("conditional", "scale_condition"), below=NEAR_ZERO),
        lambda _: "0 by construction where a whole cluster is forgotten, as no retained cell reaches its column; the "
                  "published remainder is damping",
    ),
    _conditional("encoder", "encoder", 0.433),
    _conditional("bottleneck", "bottleneck", 0.508),
    _conditional("decoder, hidden", "decoder_hidden", 0.346),
    Claim(
        "Fisher scrubbing is no better on the conditional VAE", "advantage 0.72 against 0.63", 0.72,
        lambda m: _scrub(m)[0],
        lambda m: Statement("it leaks no less than on the plain VAE", _scrub(m)[1], above=-AUC_MARGIN),
        lambda m: f"AUC beyond the retrained models', conditional − plain: {shown(_scrub(m)[1])}; the paper compared "
                  "two attackers and had no retrained conditional model",
    ),
    Claim(
        "The encoder leaks most, as 64 of 69 features are its", "stated", None, lambda m: _feature(m, "decoder"),
        lambda m: Statement("the reconstruction leaks less than the encoder", _feature(m, "decoder"), below=0),
        lambda m: f"all features, less the encoder's: {shown(_feature(m, 'all'))}; how many features there are says "
                  "nothing of what they carry",
    ),
]  # fmt: skip


def _rank(m: Measured, which: str, kind: str = "entropy") -> list[float]:
    return m.models(m.base, which, "effective_rank", "forget", kind)


def _rank_ratio(which: str, kind: str = "entropy") -> Callable[[Measured], Estimate | None]:
    def found(m: Measured) -> Estimate | None:
        other = "forget" if which == "exact_same_size" else "retain"
        pairs = zip(_rank(m, "exact", kind), m.models(m.base, which, "effective_rank", other, kind), strict=True)
        return spread([one / two for one, two in pairs], "exp(entropy), exact Fisher")

    return found


def _exact(words: str, *keys: str) -> Callable[[Measured], Estimate | None]:
    return lambda m: spread(m.models(m.base, "exact", *keys), f"{words}, exact Fisher")


def _beside(*keys: str) -> Callable[[Measured], str]:
    def why(m: Measured) -> str:
        random, batched = (spread(m.models(m.base, which, *keys), "") for which in ("exact_same_size", "published"))
        return f"as many random cells {shown(random)}; the paper's estimator on our models {shown(batched)}"

    return why


def _log_gap(m: Measured) -> Estimate | None:
    pair = (spread(m.models("probe", "observed", "log_correlation"), ""), _exact("", "log_correlation")(m))
    return minus(pair[1], pair[0], "VAE − linear classifier")


ENTRIES = [
    Claim(
        "Effective rank, forget over retain", "76,867 / 295,432 (code)", 0.26, _rank_ratio("exact"),
        lambda m: Statement("below that of as many random cells", _rank_ratio("exact_same_size")(m), below=1),
        lambda m: f"relative to as many random cells {shown(_rank_ratio('exact_same_size')(m))}; by participation, "
                  f"forget over retain {shown(_rank_ratio('exact', 'participation')(m))}",
    ),
    Claim(
        "Top 1 % of parameters in common", "0.205 (code)", 0.205, _exact("share in common", "top_1_percent"),
        None, _beside("top_1_percent"),
    ),
    Claim(
        "Correlation of log Fisher", "0.727 (code)", 0.727, _exact("correlation", "log_correlation"),
        lambda m: Statement("above the linear classifier's", _log_gap(m), above=0),
        lambda m: _beside("log_correlation")(m) + "; classifiers "
                  + ", ".join(f"{kind} {shown(spread(m.models(kind, 'observed', 'log_correlation'), ''))}"
                              for kind in ("probe", "deep", "matched")),
    ),
    Claim(
        "Overlap gene by gene: mean", "0.736 (code)", 0.736, _exact("mean over genes", "genes", "mean"),
        None, _beside("genes", "mean"),
    ),
    Claim(
        "Overlap gene by gene: median", "0.877 (code)", 0.877, _exact("median over genes", "genes", "median"),
        None, _beside("genes", "median"),
    ),
]  # fmt: skip
