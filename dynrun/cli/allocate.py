"""`dynrun allocate`: the scheme alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit

if TYPE_CHECKING:
    from dynrun.make import Settings


@options.calibrated
def allocate(
    model: options.Model,
    settings: Settings,
    quant: options.Quant = None,
    bpw: options.Bpw = None,
    size: options.Size = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The scheme's file (default: NAME-LABEL.scheme.toml here).")
    ] = None,
    probe_tokens: options.ProbeTokens = 1024,
    as_json: options.AsJson = False,
) -> None:
    """Choose one type for each tensor: the least predicted KLD within the size.

    Example: dynrun allocate demo --bpw 4.5 --out demo.toml
    """
    from dynrun.allocation.stage import allocate as choose
    from dynrun.make import imatrix_stage, read_texts, sensitivity_stage
    from dynrun.models import open_reference
    from dynrun.scheme import render, write_scheme
    from dynrun.target import budget_for, check_budget

    wanted = options.target(quant, bpw, size)
    reference = open_reference(model)
    settings = replace(settings, probes=options.probes(probe_tokens))
    reporter = StageReporter()
    texts = read_texts(reference, settings, reporter)
    imatrix = imatrix_stage(reference, texts, settings, reporter)
    budget, _ = budget_for(reference, imatrix, wanted)
    check_budget(reference, imatrix, budget, settings.menu)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, reporter.log)
    scheme = choose(reference, imatrix, table.tensors, budget)
    path = out or Path(f"{reference.name}-{budget.label}.scheme.toml")
    write_scheme(scheme, path)
    sizes = {"budget_bytes": scheme.budget_bytes, "size_bytes": scheme.size_bytes}
    data = {"path": str(path), **sizes, "predicted_kld": scheme.predicted_kld, "types": dict(scheme.types)}
    emit(as_json, data, lambda: print(f"{render(scheme)}\n{path}"))
