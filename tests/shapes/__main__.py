"""Write NAME.PRESET.json of every preset in PRESETS anew, by llama-quantize --dry-run on sparse files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.shapes import FOLDER, PRESETS, dry_run

with tempfile.TemporaryDirectory() as folder:
    for name, preset in PRESETS:
        lines = [
            f" {json.dumps(kind)}: {json.dumps(runs)}" for kind, runs in dry_run(name, preset, Path(folder)).items()
        ]
        (FOLDER / f"{name}.{preset}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
