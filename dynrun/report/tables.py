"""The tables of a report, as words: the page and the card print the same ones."""

from __future__ import annotations

from dataclasses import dataclass

from dynrun.report.data import STOCK, FileResult, Report, TaskResult
from dynrun.report.text import kld, kld_with, ratio_with, size

_GIB = 2**30


@dataclass(frozen=True)
class Table:
    """``columns``, the first one of names; rows of as many cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def divergence_table(report: Report) -> Table:
    """Size and mean KLD of each file, and what that is beside the stock curve where there is one."""
    equal = any(file.equal_size for file in report.files)
    columns = ("file", "size", "bpw", "mean KLD (95%)", *(["equal-size ratio"] if equal else []), "imatrix")
    rows = []
    for file in report.files:
        ratio = [_equal_size(file)] if equal else []
        measured = kld_with(file.kld.mean, file.kld.ci95)
        rows.append((file.name, size(file.size_bytes), f"{file.bpw:.2f}", measured, *ratio, file.imatrix or "–"))
    return Table(columns, tuple(rows))


def _equal_size(file: FileResult) -> str:
    found = file.equal_size
    if found is None:
        return "–"
    return ratio_with(found.ratio, found.ci95) + (" extrapolated" if found.extrapolated else "")


def percentile_table(report: Report) -> Table:
    """How the KLD of single tokens is spread, and what that does to the next token."""
    columns = ("file", "median", "90%", "99%", "99.9%", "maximum", "same top p", "RMS Δp", "PPL")
    rows = []
    for file in report.files:
        spread = (kld(v) for v in (file.kld.median, file.kld.p90, file.kld.p99, file.kld.p999, file.kld.max))
        rows.append((file.name, *spread, f"{file.same_top_p:.2%}", f"{file.rms_dp:.2%}", f"{file.ppl:.3f}"))
    return Table(columns, tuple(rows))


def domain_table(report: Report) -> Table | None:
    """Mean KLD by kind of text; None where there is only one."""
    names = list(dict.fromkeys(domain.name for file in report.files for domain in file.domains))
    if len(names) < 2:
        return None
    tokens = {domain.name: domain.n_tokens for file in report.files for domain in file.domains}
    columns = ("file", *(f"{name} ({tokens[name]:,} tokens)" for name in names))
    rows = []
    for file in report.files:
        means = {domain.name: kld(domain.mean) for domain in file.domains}
        rows.append((file.name, *(means.get(name, "–") for name in names)))
    return Table(columns, tuple(rows))


def continuation_table(report: Report) -> Table | None:
    """Greedy continuations beside the reference's; None where there are none."""
    rows = [
        (file.name, str(found.n_prompts), str(found.n_tokens), f"{found.identical:.0%}", f"{found.median_parted:g}")
        for file in report.files
        if (found := file.continued)
    ]
    columns = ("file", "prompts", "tokens each", "same to the end", "first other token (median)")
    return Table(columns, tuple(rows)) if rows else None


def task_table(report: Report) -> Table | None:
    """Answers to questions; None where none were asked."""
    if not report.tasks:
        return None
    columns = ("file", "task", "questions", "correct (95%)", "right→wrong", "wrong→right", "size", "efficiency")
    rows = []
    for one in report.tasks:
        correct = f"{one.accuracy:.2%} ({one.ci95[0]:.2%}–{one.ci95[1]:.2%})"
        flips = ("–" if n is None else f"{n:,}" for n in (one.right_to_wrong, one.wrong_to_right))
        weight = f"{one.size_bytes / _GIB:.3f} GiB ({one.size_bytes / 1e9:.3f} GB)"
        rows.append((one.name, one.task, f"{one.n_questions:,}", correct, *flips, weight, _efficiency(one)))
    return Table(columns, tuple(rows))


def _efficiency(one: TaskResult) -> str:
    if one.efficiency_per_gib is None or one.efficiency_per_gb is None:
        return "–"
    return f"{one.efficiency_per_gib:.2f} per GiB ({one.efficiency_per_gb:.2f} per GB)"


def file_table(report: Report) -> Table:
    """The files' names and hashes."""
    rows = [(file.name, file.file, f"{file.size_bytes:,}", file.sha256 or "–") for file in report.files]
    return Table(("name", "file", "bytes", "SHA-256"), tuple(rows))


def headlines(report: Report) -> list[str]:
    """What a reader should take home, a sentence each."""
    ratios = [
        f"KLD ratio {ratio_with(one.ratio.value, one.ratio.ci95)}: the mean KLD of {one.name} over that of "
        f"{one.other}, on the same text."
        for one in report.versus
    ]
    told = {one.name for one in report.versus}
    equal = [file for file in report.files if file.equal_size and file.kind != STOCK and file.name not in told]
    return ratios + [f"Equal-size ratio {_equal_size(f)}: {f.name} against the curve of stock presets." for f in equal]
