"""Make a proven file once more, in a folder of its own, and compare the bytes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from dynrun.gguf.shards import read_whole_header
from dynrun.models import Reference
from dynrun.paths import cache_dir
from dynrun.quantize import check_scheme, write_from_scheme
from dynrun.stages import Reporter, Settings, feedback_of, read_texts, statistics
from dynrun.verify import Check, remade, scheme_of_file


def remake(path: Path, scheme_path: Path | None, reference: Reference, settings: Settings, reporter: Reporter) -> Check:
    """Whether the file at ``path``, made again by its scheme, has the same bytes.

    Statistics and rounded tensors are found where they are still in the cache, the file itself is not looked for
    there. Not checked where there is no scheme, or the calibration that ``settings`` say is not the file's.
    """
    header = read_whole_header(path)
    scheme = scheme_of_file(path, header, scheme_path)
    if scheme is None:
        return Check("bytes", None, "not made again: there is no scheme")
    if not scheme.feedback:
        settings = replace(settings, feedback=None)
    collected = statistics(reference, read_texts(reference, settings, reporter), settings, reporter)
    said = str(header.metadata.get("dynrun.imatrix.sha256"))
    if collected.imatrix.sha256 != said:
        found = f"these calibration options give imatrix {collected.imatrix.sha256[:16]}…, the file has {said[:16]}…"
        return Check("bytes", None, f"not made again: {found}")
    with feedback_of(reference, collected, settings) as feedback:
        if scheme.feedback != (feedback.text if feedback else ""):
            return Check("bytes", None, "not made again: this dynrun rounds with other settings than the file's")
        check_scheme(reference, scheme, collected.imatrix)
        reporter.stage("quantize", f"{scheme.size_bytes:,} bytes, again")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="remake.") as folder:
            inputs = (reference, scheme, collected.imatrix, feedback, settings.config.n_threads)
            return remade(path, write_from_scheme(Path(folder), *inputs, reporter.progress))
