"""Why parameter-space methods fail: the Fisher analysis, its controls, and toy worlds whose truth is known."""
