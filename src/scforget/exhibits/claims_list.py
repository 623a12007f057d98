"""What the single-cell paper says in its section 5, claim by claim, and where our measurement of each is found.

Published numbers are those printed in the paper; what only its code shows is marked "code". How a claim is judged, and
what an interval is, stands in :mod:`scforget.exhibits.claims`; both were fixed on pbmc68k, before any other data set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scforget.exhibits.measured import Claim, Estimate, Measured, Statement, dig, minus, ratio, shown, spread, within

#: An error is dominant where it is half of all.
HALF = 0.5
#: The Fisher of a head is "approximately rank 1" where one singular vector holds this share of its squared norm.
RANK_ONE = 0.9
#: Share of parameters that may lack a gradient.
DEAD = 0.05


def _layer(group: str) -> Callable[[Measured], str]:
    def why(m: Measured) -> str:
        own = dig(m.place(m.base), "overlap", group)
        null = dig(own, "same_size")
        parts = [m.by_its_estimator(group)]
        if m.squared != m.base:
            parts.append(f"under squared error {shown(m.overlap(m.squared, group))}")
        if null:
            few = f"as many random cells {null['unbiased']:.3g} and {null['cosine']:.3g}"
            parts.append(f"noise not removed {own['cosine']:.3g}; {few}")
            parts.append(f"share of such sets that overlap no more: {null['p_lower']:.2g}")
        return "; ".join(part for part in parts if part)

    return why


def _above_probe(group: str) -> Callable[[Measured], Statement]:
    return lambda m: Statement(
        "overlaps more than the linear classifier", m.against(m.base, group, "probe", "global"), 1
    )


def _layer_claim(words: str, group: str, number: float) -> Claim:
    return Claim(
        f"Overlap in the VAE: {words}", f"{number}", number,
        lambda m: m.overlap(m.base, group), _above_probe(group), _layer(group),
    )  # fmt: skip


def _dead(m: Measured) -> Estimate | None:
    if m.squared != "log_mse":
        return None
    pairs = zip(
        m.models(m.squared, "exact", "groups", "global", "without_gradient"),
        m.models(m.squared, "exact", "groups", "global", "parameters"), strict=True,
    )  # fmt: skip
    return spread([dead / whole for dead, whole in pairs], f"{m.squared}: share of parameters without a gradient")


def _to_probe(group: str) -> Callable[[Measured], Estimate | None]:
    return lambda m: m.against(m.base, group, "probe", "output")


def _other_ratios(m: Measured) -> str:
    found = [f"to the {kind} one {shown(m.against(m.base, 'global', kind, 'global'))}" for kind in ("deep", "matched")]
    return (
        "ratio "
        + ", ".join(found)
        + f"; under squared error {shown(m.against(m.squared, 'global', 'probe', 'global'))}"
    )


def _same_size(m: Measured) -> Estimate | None:
    null = dig(m.place(m.base), "overlap", "global", "same_size")
    if null is None:
        return None
    band = within(null["unbiased"], null["range"], "random sets of retained cells")
    return ratio(m.overlap(m.base, "global"), band, "overlap relative to as many random cells")


def _smallest(group: str, its: str) -> Callable[[Measured], Estimate | None]:
    """The kind of VAE whose overlap is least above the matched classifier's: "any" must hold for it as well."""

    def least(m: Measured) -> Estimate | None:
        found = {kind: m.against(kind, group, "matched", its) for kind in m.result["variants"]}
        known = {kind: one for kind, one in found.items() if one is not None}
        if not known:
            return None
        kind = min(known, key=lambda name: known[name].value)
        value, low, high = (min(ends) for ends in zip(*(one[:3] for one in known.values()), strict=True))
        what = f"least of {len(known)} kinds of VAE, of value ({kind}) and of both ends; {known[kind].estimator}"
        return Estimate(value, low, high, what)

    return least


def _kinds(group: str) -> Callable[[Measured], str]:
    return lambda m: "; ".join(f"{kind} {shown(m.overlap(kind, group))}" for kind in m.result["variants"])


OVERLAP = [
    _layer_claim("encoder", "encoder", 0.273),
    _layer_claim("bottleneck", "bottleneck", 0.291),
    _layer_claim("decoder, hidden", "decoder_hidden", 0.232),
    _layer_claim("decoder, output", "decoder_output", 0.362),
    _layer_claim("all parameters", "global", 0.306),
    Claim(
        "Its 7,349,984 parameters take part (4,100,000 in the output)", "27.9 % never used (code)", 0.279, _dead,
        lambda m: Statement("all but 5 % have a gradient", _dead(m), below=DEAD),
        lambda m: "the paper's loss is a squared error that never reads the dispersion head, which its counts and "
                  "cosines include; damping gives that head a cosine of 1: "
                  + m.by_its_estimator("dispersion", m.squared),
    ),
    Claim(
        "Overlap in a linear classifier of the latent means", "0.018", 0.018, lambda m: m.overlap("probe", "global"),
        lambda m: Statement("less than the VAE's", m.against("probe", "global", m.base, "global"), below=1),
        lambda m: "noise not removed: " + "; ".join(
            f"{name} labels {shown(spread(m.models('probe', name, 'groups', 'global', 'cosine'), ''))}"
            for name in ("observed", "expected")
        ),
    ),
    Claim(
        "The VAE overlaps 17 times more than a classifier", "17x", 16.9,
        lambda m: m.against(m.base, "global", "probe", "global"),
        lambda m: Statement("VAE above the linear classifier", m.against(m.base, "global", "probe", "global"), 1),
        _other_ratios,
    ),
    Claim(
        "The gap arises in the output layer, which all genes share", "0.362 against 0.018", None,
        _to_probe("decoder_output"),
        lambda m: Statement("VAE's output layer above the classifier's", _to_probe("decoder_output")(m), 1),
        lambda m: f"under squared error {shown(m.against(m.squared, 'decoder_output', 'probe', 'output'))}; "
                  f"output overlap {shown(m.overlap(m.base, 'decoder_output'))}, encoder "
                  f"{shown(m.overlap(m.base, 'encoder'))}",
    ),
    Claim(
        "Abstract: any generative model with shared outputs overlaps more than a classifier", "stated", None,
        _smallest("global", "global"),
        lambda m: Statement("every kind of VAE above a classifier of its size", _smallest("global", "global")(m), 1),
        _kinds("global"),
    ),
    Claim(
        "The same of the shared output layer alone", "stated", None, _smallest("decoder_output", "output"),
        lambda m: Statement("every kind above that classifier's output", _smallest("decoder_output", "output")(m), 1),
        _kinds("decoder_output"),
    ),
    Claim(
        "Overlap is what defeats requests for a cell type (implied)", "implied", None, _same_size,
        lambda m: Statement("no less overlap than scattered cells have", _same_size(m), above=1),
        lambda m: "the paper reports failure on cell types and chance on scattered cells, whose overlap is higher; "
                  f"with cells of another kind the overlap is {shown(m.overlap(m.base, 'global', 'unrelated'))}",
    ),
]  # fmt: skip


def _factor(variant: str, key: str, kind: str | None = None) -> Callable[[Measured], Estimate | None]:
    return lambda m: m.factor(kind or m.squared, variant, key)


def _both_losses(variant: str, key: str) -> Callable[[Measured], str]:
    return lambda m: "; ".join(f"{kind} {shown(m.factor(kind, variant, key))}" for kind in {m.squared: 0, m.base: 0})


def _away(found: Estimate | None) -> Estimate | None:
    """How far a ratio is from 1, either way."""
    if found is None:
        return None
    ends = abs(found.low - 1), abs(found.high - 1)
    nearest = 0.0 if found.low <= 1 <= found.high else min(ends)
    return found._replace(value=abs(found.value - 1), low=nearest, high=max(ends))


def _without_softmax(m: Measured) -> Estimate | None:
    """What is left of the gap between product and measured without the softmax's coupling, as a share of it."""
    left, whole = (_away(m.factor(m.squared, name, "ratio")) for name in ("uncoupled", "likelihood"))
    if left is None or whole is None:
        return None
    tiny = np.finfo(float).tiny
    ends = left.low / max(whole.high, tiny), left.high / max(whole.low, tiny)
    what = f"{m.squared}: |ratio − 1| without the coupling ÷ with it; widest of both intervals"
    return Estimate(left.value / max(whole.value, tiny), *ends, what)


def _residual_gap(m: Measured) -> Estimate | None:
    """Residual profiles' cosine less the Fisher's own, under squared error."""
    if m.squared != "log_mse":
        return None
    one, other = (m.factor(m.squared, name, "cos_sigma") for name in ("residual", "likelihood"))
    return minus(one, other, f"{m.squared}: cos σ of squared residuals − of the Fisher's rows")


def _classes(m: Measured) -> float | None:
    found = dig(m.result, "variants", "conditional", "conditions")
    return None if not found else float(1 / np.sqrt(found))


def _below_classes(m: Measured) -> Statement:
    bound = _classes(m)
    found = None if bound is None else m.overlap("probe", "output")
    return Statement("the classifier's overlap is below 1/√C", found, below=bound)


def _rank_one(which: str, number: float) -> Claim:
    def ours(m: Measured) -> Estimate | None:
        return m.singular(f"rank_one_{which}")

    return Claim(
        f"The output layer's Fisher is about rank 1: {which} cells", f"{number:.0%} of the squared norm", number, ours,
        lambda m: Statement(f"above {RANK_ONE:.0%}", ours(m), above=RANK_ONE),
        lambda m: "by which it is not an outer product, ‖F − σνᵀ‖/‖F‖: " + shown(spread(
            [row[f"covariance_share_{which}"] for record in dig(m.place(m.squared), "factorisation") or []
             for row in record["variants"] if row["variant"] == "likelihood"], "",
        )),
    )  # fmt: skip


FACTORISATION = [
    Claim(
        "Proposition 1: the overlap is the product of the factors' cosines", "equal (ratio 1)", 1.0,
        _factor("likelihood", "ratio"), None,
        lambda m: "it needs residuals that do not depend on the latent; dealt to other cells, so that they do not, the "
                  f"ratio is {shown(m.factor(m.squared, 'permuted', 'ratio'))}; by loss: "
                  + _both_losses("likelihood", "ratio")(m),
    ),
    _rank_one("forget", 0.944),
    _rank_one("retain", 0.956),
    Claim(
        "Product of singular vectors' cosines", "0.41", 0.409, lambda m: m.singular("product"), None,
        lambda m: f"product of the data's own factors {shown(m.factor(m.squared, 'likelihood', 'product'))}",
    ),
    Claim(
        "Measured overlap of the output layer's weights", "0.37", 0.369, _factor("likelihood", "measured"), None,
        _both_losses("likelihood", "measured"),
    ),
    Claim(
        "The product overestimates by 11 %", "ratio 1.11", 1.107, _factor("likelihood", "ratio"),
        lambda m: Statement("product above measured", m.factor(m.squared, "likelihood", "ratio"), above=1),
        lambda m: f"by singular vectors {shown(m.singular('ratio'))}; residuals' σ against the real Fisher "
                  f"{shown(m.mismatched('ratio'))}; by loss: " + _both_losses("likelihood", "ratio")(m),
    ),
    Claim(
        "The softmax is the dominant source of that error", "stated", None, _without_softmax,
        lambda m: Statement("less than half of the error is left without it", _without_softmax(m), below=HALF),
        lambda m: "ratio without the coupling, by loss: " + _both_losses("uncoupled", "ratio")(m)
                  + "; the whole error is the covariance of the two factors over cells",
    ),
    Claim(
        "Residual profiles: cos σ from the data", "0.83", 0.83, _factor("residual", "cos_sigma"),
        lambda m: Statement("at least the corollary's 0.68", m.factor(m.squared, "residual", "cos_sigma"), above=0.679),
        lambda m: "0.68 is for an assumed M = 100 and V = 3, not measured ones; by loss: "
                  + _both_losses("residual", "cos_sigma")(m),
    ),
    Claim(
        "The Fisher's cos σ (0.51) is lower because of the NB likelihood", "0.51 against 0.83", None, _residual_gap,
        lambda m: Statement("no gap under squared error, where there is no NB", _residual_gap(m), below=0),
        lambda m: f"squared error's Fisher weighs a residual by share and size of the cell: cos σ "
                  f"{shown(m.factor(m.squared, 'likelihood', 'cos_sigma'))}, by singular vectors "
                  f"{shown(m.singular('cos_sigma'))}; the paper's models were trained by squared error",
    ),
    Claim(
        "Corollary 2 (ii): 1/√C, and a measured overlap below it", "0.27 for C = 14", None,
        lambda m: m.overlap("probe", "output"), _below_classes,
        lambda m: "" if _classes(m) is None else f"1/√C is {_classes(m):.3g} here, said of one of two factors",
    ),
]  # fmt: skip
