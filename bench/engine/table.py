"""What was found, as a page a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

START, END = "<!-- bench:start -->", "<!-- bench:end -->"

#: What each number says, in the order of the table.
MEANING: dict[str, str] = {
    "epoch_fp32_vs_naive": "epoch: plain eager torch / ours, fp32",
    "epoch_fp32_vs_naive_switched": "epoch: plain torch with oneDNN's matrix products / ours, fp32",
    "epoch_bf16_vs_naive": "epoch: plain eager torch / ours, bf16",
    "epoch_bf16_vs_naive_switched": "epoch: plain torch with oneDNN's matrix products / ours, bf16",
    "epoch_fp32_vs_scvi": "epoch: scvi-tools / ours, fp32",
    "epoch_fp32_vs_scvi_switched": "epoch: scvi-tools with oneDNN's matrix products / ours, fp32",
    "epoch_bf16_vs_scvi": "epoch: scvi-tools / ours, bf16",
    "epoch_bf16_vs_scvi_switched": "epoch: scvi-tools with oneDNN's matrix products / ours, bf16",
    "time_to_scvi_elbo": "time to scvi-tools's best held-out ELBO: scvi-tools / ours, fp32",
    "retrain_seconds": "seconds of a retrain in one cycle of 14 epochs",
    "retrain_gap": "its distance from the best held-out ELBO of a cycle three times as long, relative",
    "fisher_vs_loop": "Fisher diagonal: a backward pass a cell / ours",
    "fisher_vs_opacus": "Fisher diagonal: Opacus's per-cell gradients / ours",
    "fisher_relative_error": "its relative error against float64",
    "fisher_relative_error_worst_tensor": "the same, of the worst tensor",
    "dp_step_vs_opacus_ghost": "private step, 256 cells: Opacus's ghost clipping / ours",
    "dp_step_vs_opacus_ghost_switched": "private step: ghost clipping with oneDNN's matrix products / ours",
    "dp_step_vs_nonprivate": "private step / our own step without privacy (lower is better)",
    "ensemble8_vs_sequential": "8 models: one after another on all threads / in processes of one thread",
    "peak_mb": "peak memory of training, fp32, MB",
}


def _number(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(value: Any) -> str:
    if value is None:
        return "not reached | | "
    if isinstance(value, dict):
        return f"{_number(value['median'])} | {_number(value['low'])} – {_number(value['high'])} | {value['n']}"
    return f"{_number(value)} | | "


def _ratios(found: dict[str, Any]) -> list[str]:
    known = [key for key in MEANING if key in found["ratios"]]
    rows = [f"| {MEANING[key]} | {_ratio(found['ratios'][key])} |" for key in known]
    return ["| what | median | quartiles | turns |", "|---|---|---|---|", *rows, ""]


def _seconds(found: dict[str, Any]) -> list[str]:
    lines = ["| | median s | quartiles |", "|---|---|---|"]
    for group, what in (("epoch_seconds", "epoch"), ("fisher_seconds", "Fisher diagonal of 28,094 cells"),
                        ("dp_step_seconds", "step of 256 cells"), ("ensemble_seconds", "8 models")):  # fmt: skip
        for name, value in found.get(group, {}).items():
            spread = f"{_number(value['low'])} – {_number(value['high'])}"
            lines.append(f"| {what}, {name} | {_number(value['median'])} | {spread} |")
    return [*lines, ""] if len(lines) > 2 else []


def _growth(found: dict[str, Any]) -> list[str]:
    if not found.get("growth"):
        return []
    columns = ("cells", "genes", "nonzeros", "epoch_seconds", "peak_mb", "above_baseline_mb", "dense_counts_mb")
    lines = ["| cells | genes | nonzeros | epoch, s | peak, MB | above imports, MB | dense counts would be, MB |"]
    lines.append("|" + "---|" * len(columns))
    for row in found["growth"]:
        whole = [f"{row[name]:,}" for name in columns[:3]]
        lines.append("| " + " | ".join(whole + [_number(row[name]) for name in columns[3:]]) + " |")
    return [*lines, ""]


def _profiles(found: dict[str, Any]) -> list[str]:
    profiles: dict[str, Any] = found.get("profile", {})
    if not profiles:
        return []
    names = list(profiles)
    lines = ["Self time of operators, ms a step under torch's profiler, which slows small operators down:", ""]
    lines += ["| " + " | ".join(f"{name} | ms" for name in names) + " |", "|" + "---|" * 2 * len(names)]
    for row in zip(*(profiles[name]["top"] for name in names), strict=False):
        lines.append("| " + " | ".join(f"`{one['operator']}` | {one['ms']:.2f}" for one in row) + " |")
    sums = " | ".join(f"all operators | {profiles[name]['all_ms']:.1f}" for name in names)
    return [*lines, f"| {sums} |", ""]


def page(found: dict[str, Any]) -> str:
    """Markdown: where, the ratios, what they are made of, growth, profiles."""
    hardware, versions = found["hardware"], found["versions"]
    built = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    command = "`make bench` (quick: too few turns to quote)" if found["settings"]["quick"] else "`make bench`"
    changed = " with uncommitted changes" if found["uncommitted_changes"] else ""
    lines = [
        f"{command}: {hardware['cores']} cores of {hardware['cpu']}, {hardware['torch_threads']} threads a process;",
        f"{built}. Commit {found['commit'][:7]}{changed}, {found['date'][:10]}.",
        "28,124 cells × 2,000 genes of simulated counts, net 2000-1024-512-128-32 (7,349,984 parameters), batches of",
        "128; variants take turns in one run, each in a process of its own; a ratio is the median over turns.", "",
        *_ratios(found), *_seconds(found), *_growth(found), *_profiles(found),
    ]  # fmt: skip
    if found["skipped"]:
        lines.append("Not measured: " + "; ".join(f"{what} ({why})" for what, why in found["skipped"].items()) + ".")
    return "\n".join(lines)


def insert(path: Path, text: str) -> bool:
    """Replace what stands between the two markers of a file; whether it has them."""
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if START not in whole or END not in whole:
        return False
    before, rest = whole.split(START, 1)
    path.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    return True
