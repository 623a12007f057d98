from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from judged import audit_settings, draw, small_case
from scforget.arrays import FloatArray
from scforget.data.splits import ForgetSets
from scforget.methods.retain_finetune import RetainFinetuneSettings
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.theory.ablations import make
from scforget.theory.attackers import Attack
from scforget.theory.judging import Judge
from scforget.theory.variants import Variant, variant_attacks, variant_jobs, variant_models, variant_rows

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def variants(make_task: Callable[..., VaeTask], forget_sets: ForgetSets) -> dict[str, Variant]:
    """A plain model, and one with a smaller latent space."""
    found, audit = {}, audit_settings()
    for name, task in (("plain", make_task()), ("other", make_task(latent=3))):
        case = small_case(task, forget_sets)
        retrains = [case.score(task.new_model(seed)) for seed in range(10, 14)]
        found[name] = Variant(Judge(case, retrains, audit, 0), [task.new_model(seed) for seed in range(2)])
    return found


@pytest.fixture(scope="module")
def methods(recipe: Recipe) -> dict[str, Settings]:
    return {"retain_finetune": RetainFinetuneSettings(**recipe(max_epochs=1))}


def guesses(tried: list[Attack]) -> list[FloatArray]:
    """Scores that know nothing, in place of attackers that take seconds to train."""
    return [np.random.default_rng(i).normal(size=len(one.features)) for i, one in enumerate(tried)]


def test_variant_models_are_those_of_the_jobs(variants: dict[str, Variant], methods: dict[str, Settings]) -> None:
    jobs = variant_jobs(variants, methods, 0)
    names = ["plain", "plain", "other", "other"]
    assert all(job.case is variants[name].judge.case for job, name in zip(jobs, names, strict=True))
    results = [make(job) for job in jobs]
    models = variant_models(variants, methods, jobs, ["diverged", *results[1:]])
    assert list(models) == [
        ("plain", "original"), ("other", "original"), ("plain", "retain_finetune"), ("other", "retain_finetune"),
    ]  # fmt: skip
    assert models["plain", "retain_finetune"] == [results[1]]
    assert models["other", "retain_finetune"] == results[2:]
    wanted = variants["other"].judge.case.score(variants["other"].originals[1])
    np.testing.assert_array_equal(models["other", "original"][1].features, wanted.features)


def test_variant_rows_judge_with_the_learned_attack(variants: dict[str, Variant], methods: dict[str, Settings]) -> None:
    jobs = variant_jobs(variants, methods, 0)
    results = [make(job) for job in jobs]
    models = variant_models(variants, methods, jobs, results)
    tried = variant_attacks(variants, models, audit_settings().of("mlp"), 0)
    assert len(tried) == 2 * 2 * (4 + 2 + 2)
    assert [one.features.shape[1] for one in tried[::16]] == [5 + 2 * 4, 5 + 2 * 3]
    assert (tried[8].controls == variants["plain"].judge.case.groups.controls["matched_knn"]).all()
    found = variant_rows(variants, models, guesses(tried))
    row = found["rows"][-1]
    assert (row["variant"], row["method"], row["failed"]) == ("other", "retain_finetune", 0)
    judge = variants["other"].judge
    assert row["trace"] == judge.judge(models["other", "retain_finetune"], models["other", "original"])["trace"]
    [contrast, last] = found["contrasts"]
    assert (contrast["variant"], contrast["against"], last["method"]) == ("other", "plain", "retain_finetune")
    first = next(one for one in found["rows"] if one["variant"] == "plain" and one["method"] == "retain_finetune")
    for name in ("membership", "matched_knn", "learned_same_group", "learned_matched_knn"):
        assert last[name]["difference"] == pytest.approx(row[name]["difference"] - first[name]["difference"])
        assert last[name]["interval"][0] < last[name]["difference"] < last[name]["interval"][1]
    json.dumps(found, allow_nan=False)


def test_variant_rows_put_every_score_where_it_belongs(
    variants: dict[str, Variant], methods: dict[str, Settings]
) -> None:
    models = {
        (name, method): draw(variants[name].judge.case, 2, seed)
        for seed, (name, method) in enumerate((v, m) for m in ("original", "retain_finetune") for v in variants)
    }
    judge = variants["plain"].judge
    cells = len(judge.case.cells)
    order = [
        (v, m, c)
        for v in variants
        for c in ("same_group", "matched_knn")
        for m in (None, *("original", "retain_finetune"))
    ]
    scores, at = [], {}
    for key in order:
        at[key] = [np.random.default_rng(len(scores) + i).normal(size=cells) for i in range(2 if key[1] else 4)]
        scores += at[key]
    found = variant_rows(variants, models, scores)
    for row in found["rows"]:
        for control in ("same_group", "matched_knn"):
            groups = variants[row["variant"]].judge.case.groups
            own = groups.aucs(np.stack(at[row["variant"], row["method"], control]), control)
            base = groups.aucs(np.stack(at[row["variant"], None, control]), control)
            assert row[f"learned_{control}"]["per_model"] == pytest.approx(own)
            assert row[f"learned_{control}"]["retrain_mean"] == pytest.approx(base.mean())


def test_variant_rows_go_on_without_a_method_that_always_diverged(
    variants: dict[str, Variant], methods: dict[str, Settings]
) -> None:
    jobs = variant_jobs(variants, methods, 0)
    models = variant_models(variants, methods, jobs, ["diverged"] * 4)
    tried = variant_attacks(variants, models, audit_settings().of("mlp"), 0)
    found = variant_rows(variants, models, guesses(tried))
    assert [row["models"] for row in found["rows"]] == [2, 2, 0, 0]
    assert [row["failed"] for row in found["rows"]] == [0, 0, 2, 2]
    assert [one["method"] for one in found["contrasts"]] == ["original"]
