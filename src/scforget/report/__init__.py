"""What people see of an audit: functions of plain dicts and arrays that give tables, pictures and one HTML page.

Public surface
--------------
tables
    ``summary`` (the JSON for Git), ``scenario_table``, ``display``, ``to_rich``, ``to_markdown``, ``to_csv``.
figures
    ``training_curves``, ``roc``, ``score_histograms``, ``umap``, of one model or population; ``svg_text`` and
    ``png_bytes`` turn a figure into the same bytes every time.
comparisons
    ``distance_to_target``, ``cost_against_trace``, ``attack_grid``, of all methods; ``frontier``, of many recipes.
cells
    ``cell_scores``: how exposed each forget cell remains.
page, details, evidence_tables
    ``render``: the self-contained report, verdict first; ``tables``: what it folds away.
explain
    ``explain``: an audit in plain words.

The room reads and writes no files: ``stages`` does.
"""

__all__ = ["figures", "page", "tables"]
