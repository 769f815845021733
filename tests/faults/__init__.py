"""Faults on purpose. ``INHIBITOR_FAULTS=long`` (``make faults``) tries more of them and writes down what held."""

import json
import os
from pathlib import Path
from typing import Any

LONG = os.environ.get("INHIBITOR_FAULTS") == "long"


def record(**figures: Any) -> None:
    """Add figures to the file that ``make faults`` prints, if it runs."""
    path = os.environ.get("INHIBITOR_FAULTS_RECORD")
    if path is not None:
        file = Path(path)
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(known | figures, indent=2) + "\n", encoding="utf-8")
