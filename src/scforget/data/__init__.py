"""Cells in: reading, preparing, splitting and simulating them.

Importing this package imports none of its modules, so it costs nothing; import the module that you need.

sources
    ``read`` counts from h5ad or 10x files; ``write_bundled`` makes the bundled set; ``PUBLIC``, ``fetch`` and ``join``
    bring the public sets.
prepare
    ``PrepareSettings``, ``LeidenSettings``, ``prepare`` (quality control and labels), ``leiden``, ``select_genes``,
    ``markers``.
splits, controls
    The cell sets, and who plays the non-member.
synthetic
    ``SyntheticSettings``, ``simulate``, ``PRESETS``: counts whose truth is known.
"""

__all__ = ["controls", "prepare", "sources", "splits", "synthetic"]
