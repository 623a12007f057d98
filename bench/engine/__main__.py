"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.engine import facts, parts, table

RESULTS, SCRATCH = facts.ROOT / "bench" / "results", facts.ROOT / "build" / "bench"
DOCUMENT = facts.ROOT / "docs" / "performance.md"
BUSY = 0.5  # processes running or waiting before anything of ours does

_EXPLAINED = """
Variants take turns (A B C A B C ...), each in a process of its own, so that what slows the machine down slows all of
them; every ratio is the median over turns with its quartiles. Leave the machine alone meanwhile.

  training   plain torch, ours in fp32 and bf16, scvi-tools, the slow ones also with oneDNN's matrix products; profiles
  fisher     our diagonal of all cells against a backward pass a cell, Opacus, and float64
  private    our DP-SGD step against Opacus's ghost clipping and against a step without privacy
  ensemble   8 models in processes of one thread against one after another
  growth     seconds of an epoch and peak memory at 8,000 to 130,000 cells and 1,000 to 4,000 genes
  retrain    (long) seconds from nothing to a converged held-out ELBO
  matched    (long) seconds to the held-out ELBO that scvi-tools reaches in 50 epochs

A finished part is kept in bench/results/ and taken from there while the product's sources, the versions and the
settings are the same; --again measures it anew. Everything together goes to bench/results/engine.json and engine.md
and between the markers of docs/performance.md. With --quick it goes to build/bench/ alone.

examples:
  make bench                                       what is measured in about fifteen minutes
  make bench LONG=1                                the long parts too
  python -m bench.engine --quick                   does it work? two minutes
  python -m bench.engine --part fisher --again     one part anew
"""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description="What the product's engine is worth, side by side with what it replaces.",
        epilog=_EXPLAINED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few turns of few steps: not to be quoted")
    parser.add_argument("--long", action="store_true", help="also train to convergence, and to scvi-tools's ELBO")
    parser.add_argument("--again", action="store_true", help="measure anew what is kept from before")
    parser.add_argument(
        "--part", action="append", choices=[*parts.SHORT, *parts.LONG], help="measure only this (repeatable)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process (default: all cores)")
    return parser.parse_args()


def key(plan: parts.Plan) -> dict[str, Any]:
    """What a part that is kept must have been measured with."""
    settings = json.loads(json.dumps(asdict(plan)))
    return {"sources": facts.fingerprint(), "versions": facts.versions(), "settings": settings}


def kept(name: str, plan: parts.Plan, folder: Path) -> dict[str, Any] | None:
    """A part as measured before, if that still holds."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return part if part["key"] == key(plan) else None


def measured(name: str, plan: parts.Plan, folder: Path) -> dict[str, Any]:
    """Measure one part and keep it."""
    used, stamp, start = key(plan), facts.stamp(), time.perf_counter()
    if stamp["load_average"][0] > BUSY:
        print(f"{name}: this machine is busy (load {stamp['load_average'][0]}): spreads will be wide", flush=True)
    found = (parts.SHORT | parts.LONG)[name](plan, parts.Cells(SCRATCH))
    part = {"key": used, "stamp": stamp, "minutes": (time.perf_counter() - start) / 60, **found}
    print(f"{name}: done in {part['minutes']:.1f} minutes", flush=True)
    write(folder / f"{name}.json", part)
    return part


def collect(wanted: list[str], plan: parts.Plan, folder: Path, again: bool) -> dict[str, dict[str, Any]]:
    """The wanted parts, measured or kept, and whatever else is kept."""
    found = {}
    for name in (*parts.SHORT, *parts.LONG):
        part = None if again and name in wanted else kept(name, plan, folder)
        if part is not None:
            print(f"{name}: kept from {part['stamp']['date']} (--again measures anew)", flush=True)
        elif name in wanted:
            part = measured(name, plan, folder)
        if part is not None:
            found[name] = part
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def together(found: dict[str, dict[str, Any]], plan: parts.Plan, skipped: dict[str, str]) -> dict[str, Any]:
    """One record of all parts."""
    measured = {name: part["stamp"] | {"minutes": part["minutes"]} for name, part in found.items()}
    record: dict[str, Any] = {
        **facts.stamp(), "hardware": facts.hardware(plan.threads), "versions": facts.versions(),
        "settings": asdict(plan), "measured": measured, "skipped": skipped, "ratios": {},
    }  # fmt: skip
    for part in found.values():
        record["ratios"] |= part["ratios"]
        record |= {name: value for name, value in part.items() if name not in ("key", "stamp", "minutes", "ratios")}
    return record


def main() -> None:
    """Measure what is asked for and write it down."""
    asked = arguments()
    plan = (parts.quick if asked.quick else parts.full)(asked.threads)
    folder = SCRATCH / "quick" if asked.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    wanted, skipped = asked.part or [*parts.SHORT, *(parts.LONG if asked.long else ())], {}
    if not facts.has_scvi():
        skipped["scvi-tools"] = "it is not installed: pip install --constraint constraints.txt --editable '.[bench]'"
        wanted = [name for name in wanted if name != "matched"]
        print(f"skipping every comparison with scvi-tools: {skipped['scvi-tools']}", flush=True)
    found = collect(wanted, plan, folder, asked.again)
    skipped |= {name: "not asked for" for name in (*parts.SHORT, *parts.LONG) if name not in found}
    record = together(found, plan, skipped)
    text = table.page(record)
    write(folder / "engine.json", record)
    (folder / "engine.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten: {folder / 'engine.json'} and engine.md", flush=True)
    whole = not asked.quick and found.keys() >= parts.SHORT.keys()
    if whole and not table.insert(DOCUMENT, text):
        print(f"{DOCUMENT} has no markers {table.START} and {table.END}: not changed", flush=True)


if __name__ == "__main__":
    main()
