"""Models and observation models.

Public: :class:`~scforget.models.vae.VAE`, :class:`~scforget.models.vae.VAESettings`, and the log-likelihoods of
:mod:`scforget.models.likelihoods`.
"""
