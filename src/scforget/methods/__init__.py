"""Unlearning methods: one file each, with its settings and one function; these registries name them all.

A method gets a copy of the original that is its own to change, the task, the cell sets of the request, its settings,
a seed and a checkpoint, and returns a :class:`~scforget.training.Trained`. ``NAME_published`` is what the single-cell
paper's released code does under that name, kept for comparison; it departs from the papers it cites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from scforget.methods import (
    adv_neg_grad,
    bad_teacher,
    cf_k,
    contrastive_finetune,
    contrastive_latent,
    contrastive_latent_published,
    dp_sgd,
    dp_sgd_published,
    extragradient,
    extragradient_published,
    fisher_scrub,
    fisher_scrub_published,
    frozen_critics,
    frozen_critics_published,
    gisa,
    gradient_ascent,
    gradient_ascent_published,
    influence,
    neg_grad,
    noisy_finetune,
    partial_reset,
    random_labels,
    reset_distill,
    retain_finetune,
    retain_finetune_published,
    retrain_published,
    scrub,
    scrub_published,
    shrink_perturb,
    similarity_teacher,
    sisa,
    ssd,
    ssd_published,
    ungan,
    unsir,
)
from scforget.settings import Settings
from scforget.training import Trained

__all__ = ["CLASSIFIER_METHODS", "METHODS", "Method"]


class Method(NamedTuple):
    """A method's settings class and its function ``(model, task, sets, settings, *, seed, checkpoint)``."""

    settings: type[Settings]
    run: Callable[..., Trained]


CLASSIFIER_METHODS: dict[str, Method] = {
    "retain_finetune": Method(retain_finetune.ClassFinetuneSettings, retain_finetune.class_finetune),
    "random_labels": Method(random_labels.RandomLabelsSettings, random_labels.random_labels),
    "neg_grad": Method(neg_grad.NegGradSettings, neg_grad.neg_grad),
    "adv_neg_grad": Method(adv_neg_grad.AdvNegGradSettings, adv_neg_grad.adv_neg_grad),
    "cf_k": Method(cf_k.CFkSettings, cf_k.cf_k),
    "unsir": Method(unsir.UnsirSettings, unsir.unsir),
    "scrub": Method(scrub.ClassScrubSettings, scrub.class_scrub),
    "ssd": Method(ssd.SSDSettings, ssd.ssd),
    "gisa": Method(gisa.GisaSettings, gisa.gisa),
    "bad_teacher": Method(bad_teacher.BadTeacherSettings, bad_teacher.bad_teacher),
    "similarity_teacher": Method(similarity_teacher.SimilarityTeacherSettings, similarity_teacher.similarity_teacher),
    "contrastive_finetune": Method(
        contrastive_finetune.ContrastiveFinetuneSettings, contrastive_finetune.contrastive_finetune
    ),
    "ungan": Method(ungan.UnganSettings, ungan.ungan),
}
METHODS: dict[str, Method] = {
    "retain_finetune": Method(retain_finetune.RetainFinetuneSettings, retain_finetune.retain_finetune),
    "gradient_ascent": Method(gradient_ascent.GradientAscentSettings, gradient_ascent.gradient_ascent),
    "frozen_critics": Method(frozen_critics.FrozenCriticsSettings, frozen_critics.frozen_critics),
    "extragradient": Method(extragradient.ExtragradientSettings, extragradient.extragradient),
    "fisher_scrub": Method(fisher_scrub.FisherScrubSettings, fisher_scrub.fisher_scrub),
    "ssd": Method(ssd.SSDSettings, ssd.ssd),
    "contrastive_latent": Method(contrastive_latent.ContrastiveLatentSettings, contrastive_latent.contrastive_latent),
    "scrub": Method(scrub.ScrubSettings, scrub.scrub),
    "dp_sgd": Method(dp_sgd.DPSGDSettings, dp_sgd.dp_sgd),
    "sisa": Method(sisa.SISASettings, sisa.sisa),
    "noisy_finetune": Method(noisy_finetune.NoisyFinetuneSettings, noisy_finetune.noisy_finetune),
    "influence": Method(influence.InfluenceSettings, influence.influence),
    "partial_reset": Method(partial_reset.PartialResetSettings, partial_reset.partial_reset),
    "reset_distill": Method(reset_distill.ResetDistillSettings, reset_distill.reset_distill),
    "shrink_perturb": Method(shrink_perturb.ShrinkPerturbSettings, shrink_perturb.shrink_perturb),
    "ungan": Method(ungan.UnganSettings, ungan.ungan),
    "retain_finetune_published": Method(
        retain_finetune_published.RetainFinetunePublishedSettings, retain_finetune_published.retain_finetune_published
    ),
    "gradient_ascent_published": Method(
        gradient_ascent_published.GradientAscentPublishedSettings, gradient_ascent_published.gradient_ascent_published
    ),
    "frozen_critics_published": Method(
        frozen_critics_published.FrozenCriticsPublishedSettings, frozen_critics_published.frozen_critics_published
    ),
    "extragradient_published": Method(
        extragradient_published.ExtragradientPublishedSettings, extragradient_published.extragradient_published
    ),
    "fisher_scrub_published": Method(
        fisher_scrub_published.FisherScrubPublishedSettings, fisher_scrub_published.fisher_scrub_published
    ),
    "ssd_published": Method(ssd_published.SSDPublishedSettings, ssd_published.ssd_published),
    "contrastive_latent_published": Method(
        contrastive_latent_published.ContrastiveLatentPublishedSettings,
        contrastive_latent_published.contrastive_latent_published,
    ),
    "scrub_published": Method(scrub_published.ScrubPublishedSettings, scrub_published.scrub_published),
    "dp_sgd_published": Method(dp_sgd_published.DPSGDPublishedSettings, dp_sgd_published.dp_sgd_published),
    "retrain_published": Method(retrain_published.RetrainPublishedSettings, retrain_published.retrain_published),
}
