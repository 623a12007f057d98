"""Searches for methods' settings against the retrained models; the only room that imports Optuna."""
