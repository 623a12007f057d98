"""The single-cell paper's claims beside several data sets, as one table.

``python -m bench.claims NAME=FOLDER:REQUEST …``. FOLDER is a project's ``report/theory`` after ``theory overlap``
and ``ablation`` of its only data set, REQUEST the request whose numbers stand beside the paper's. Writes Markdown to
standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scforget.exhibits import claims


def main(arguments: list[str]) -> None:
    """Read each folder's only data set, and print the table."""
    frames = {}
    for argument in arguments:
        name, _, place = argument.partition("=")
        folder, _, request = place.rpartition(":")
        (result,) = Path(folder).glob("overlap/*/result.json")
        more = {}
        for part in ("features", "conditional"):
            for path in Path(folder).glob(f"ablation/*/{part}.json"):
                more[part] = json.loads(path.read_text())
        frames[name] = claims.claims(json.loads(result.read_text()), more, request=request)
    print(claims.to_markdown(frames))


if __name__ == "__main__":
    main(sys.argv[1:])
