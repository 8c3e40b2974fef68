"""`dynrun verify`: a made file against what it says of itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit

if TYPE_CHECKING:
    from dynrun.stages import Settings
    from dynrun.verify import Check

_MARKS = {True: "ok", False: "WRONG", None: "not checked"}


@options.calibrated
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF that `make` or `quantize` made; any shard.")],
    settings: Settings,
    scheme: Annotated[
        Path | None, typer.Option("--scheme", help="Its scheme (default: FILE.scheme.toml beside it).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="The model that it was made from.")
    ] = None,
    remake: Annotated[
        bool,
        typer.Option(
            "--remake",
            help="Make it again from scheme and reference, with the calibration options it was made with, and compare "
            "the bytes. Statistics in the cache are used: name an empty DYNRUN_CACHE to collect them anew.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check a made file against its scheme, its imatrix and its reference: types, sizes, metadata, weights, bytes.

    Example: dynrun verify demo-Q3_K_M.gguf --reference demo --remake
    """
    checks = _checks(file, settings, scheme, reference, remake)
    ok = all(check.ok is not False for check in checks)
    findings = [asdict(check) for check in checks if check.ok is False]
    data: dict[str, Any] = {"ok": ok, "findings": findings, "checks": [asdict(check) for check in checks]}
    emit(as_json, data, lambda: print(_table(checks, file)))
    if not ok:
        raise typer.Exit(1)


def _checks(file: Path, settings: Settings, scheme: Path | None, reference: str | None, remake: bool) -> list[Check]:
    from dynrun.errors import UsageError
    from dynrun.models import open_reference
    from dynrun.verify import Given, verify

    if remake and reference is None:
        raise UsageError("--remake needs the model that the file was made from", fix="name it with --reference")
    reporter = StageReporter()
    model = open_reference(reference) if reference is not None else None
    imatrix = settings.imatrix_files[0] if len(settings.imatrix_files) == 1 and not remake else None
    reporter.stage("verify", str(file))
    checks = verify(file, Given(scheme, model.header if model else None, imatrix), reporter.progress)
    if remake and model is not None and all(check.ok is not False for check in checks):
        from dynrun.remake import remake as again

        checks.append(again(file, scheme, model, settings, reporter))
    return checks


def _table(checks: list[Check], file: Path) -> str:
    lines = [f"{check.name:14} {_MARKS[check.ok]:12} {check.detail}" for check in checks]
    wrong, left = (sum(check.ok is one for check in checks) for one in (False, None))
    ending = f"{wrong} of {len(checks)} checks failed" if wrong else "nothing is wrong with it"
    return "\n".join([*lines, "", f"{file.name}: {ending}{f', {left} not checked' if left else ''}"])
