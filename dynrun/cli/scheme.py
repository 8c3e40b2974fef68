"""`dynrun scheme`: look at schemes, compare them, and take them out of GGUFs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, megabytes, say
from dynrun.report.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dynrun.gguf.header import TensorInfo
    from dynrun.scheme import Scheme
    from dynrun.scheme_diff import Change, Difference, Side
    from dynrun.scheme_gguf import Opened, Share

_FILE_HELP = "A scheme, or a GGUF (of a split one, any shard)."
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="A GGUF of the model, or its name: gives shapes, and checks a scheme's names."
    ),
]
_MAX_KIND = 28
# Between these bits per weight a cell's colour changes, from blue to red.
_COLD, _HOT = 1.5, 8.5


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=_FILE_HELP)],
    model: Model = None,
    as_json: options.AsJson = False,
) -> None:
    """What a scheme gives to which tensors: sizes of each type, and a map of kinds and layers.

    Example: dynrun scheme show demo-Q3_K_M.scheme.toml
    """
    from dynrun.scheme_gguf import open_scheme, shares

    tensors = _tensors(model)
    opened = open_scheme(file, tensors)
    shapes = opened.shapes or tensors or {}
    of_types = shares(opened.scheme.types, shapes)
    data = {
        "path": str(file),
        **_sized(opened.scheme, shapes),
        "shares": [vars(share) for share in of_types],
        "kept": {name: tensor.type for name, tensor in opened.kept.items()},
        "rules": dict(opened.scheme.rules),
        "slopes": len(opened.scheme.slopes),
        "types": dict(opened.scheme.types),
    }
    emit(as_json, data, lambda: _show(opened, shapes, of_types))


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=_FILE_HELP)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other, likewise.")],
    model: Model = None,
    as_json: options.AsJson = False,
) -> None:
    """Which tensors have other types in B than in A, and what both weigh.

    Example: dynrun scheme diff demo-Q3_K_M.scheme.toml model-UD-Q3_K_XL.gguf
    """
    from dynrun.scheme_diff import compare
    from dynrun.scheme_gguf import open_scheme

    tensors = _tensors(model)
    found = compare(open_scheme(a, tensors), open_scheme(b, tensors), tensors)
    sides = {"a": found.a, "b": found.b}
    data = {
        **{key: {"path": str(s.opened.path), **_head(s.scheme), **_size(s)} for key, s in sides.items()},
        "n_same": found.n_same,
        "changes": [vars(change) for change in found.changes()],
        "only_a": found.only["a"],
        "only_b": found.only["b"],
        "types": {name: list(pair) for name, pair in found.types.items()},
    }
    emit(as_json, data, lambda: _show_diff(found))


def from_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF of a model (of a split one, any shard).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The scheme's file (default: printed).")] = None,
    as_json: options.AsJson = False,
) -> None:
    """The types of any GGUF as a scheme, so that the same can be made of another model of its shape.

    Example: dynrun scheme from model-UD-Q3_K_XL.gguf --out unsloth.scheme.toml
    """
    from dynrun.gguf.shards import read_whole_header
    from dynrun.scheme import render, write_scheme
    from dynrun.scheme_gguf import opened_gguf, quantized_beyond

    opened = opened_gguf(file, read_whole_header(file))
    beyond = quantized_beyond(opened)
    if beyond:
        say(f"left out, as llama-quantize cannot make them: {_some(f'{n} ({t})' for n, t in beyond.items())}")
    if out is not None:
        write_scheme(opened.scheme, out)
    data = {
        "path": None if out is None else str(out),
        **_sized(opened.scheme, opened.shapes),
        "left_out": beyond,
        "types": dict(opened.scheme.types),
    }
    emit(as_json, data, lambda: print(render(opened.scheme), end="") if out is None else print(out))


def _tensors(model: str | None) -> Mapping[str, TensorInfo] | None:
    """The quantizable tensors of MODEL."""
    if model is None:
        return None
    from dynrun.gguf.quantizable import quantizable
    from dynrun.gguf.shards import read_whole_header
    from dynrun.models import resolve

    return quantizable(read_whole_header(resolve(model).path))


def _head(scheme: Scheme) -> dict[str, Any]:
    return {key: value for key, value in vars(scheme).items() if key not in ("types", "rules", "slopes")}


def _sized(scheme: Scheme, shapes: Mapping[str, TensorInfo]) -> dict[str, Any]:
    from dynrun.scheme_gguf import bpw, nbytes

    sizes = {"nbytes": nbytes(scheme.types, shapes), "bpw": bpw(scheme.types, shapes)}
    return {**_head(scheme), "n_tensors": len(scheme.types), **sizes}


def _size(side: Side) -> dict[str, Any]:
    return {"n_tensors": len(side.scheme.types), "nbytes": side.nbytes, "bpw": side.bpw}


def _some(parts: Iterable[str], most: int = 8) -> str:
    """The first of ``parts``, and how many more there are."""
    listed = list(parts)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return visible(", ".join(listed[:most])) + more


def _about(scheme: Scheme) -> str:
    """The head in one line: only what is known."""
    parts = [scheme.label, scheme.architecture]
    parts += [f"of {scheme.source}"] if scheme.source else []
    parts += [megabytes(scheme.size_bytes)] if scheme.size_bytes else []
    parts += [f"predicted KLD {scheme.predicted_kld:.4f}"] if scheme.predicted_kld is not None else []
    parts += [f"measured KLD {scheme.measured_kld:.4f}"] if scheme.measured_kld is not None else []
    return visible(", ".join(part for part in parts if part))


# -- show --------------------------------------------------------------------------------------------------------------


def _show(opened: Opened, shapes: Mapping[str, TensorInfo], of_types: list[Share]) -> None:
    from rich.console import Console
    from rich.text import Text

    from dynrun.scheme_gguf import bpw, nbytes

    console = Console(highlight=False)
    scheme = opened.scheme

    def line(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    line(_about(scheme))
    average, size = bpw(scheme.types, shapes), nbytes(scheme.types, shapes)
    weight = f", {megabytes(size)}, {average:.3f} bits per weight" if average is not None and size is not None else ""
    line(f"quantizable tensors: {len(scheme.types)}{weight}")
    if opened.kept:
        line(f"others, never quantized: {len(opened.kept)}, {megabytes(sum(t.nbytes for t in opened.kept.values()))}")
    for name, type_name in scheme.rules.items():
        line(f"{visible(name)}: {type_name} (a rule; --model MODEL applies it)")
    if scheme.slopes:
        line(f"slopes of {len(scheme.slopes)} tensors")
    if scheme.types:
        _show_map(console, scheme.types)
        console.print()
        console.print(_legend(of_types))


def _show_map(console: Console, types: Mapping[str, str]) -> None:
    """Tensors outside of blocks, then rows of kinds and columns of layers, as many times as the width asks for."""
    from rich.text import Text

    from dynrun.scheme_types import block_of, kind_order

    rows: dict[str, dict[int, str]] = {}
    for name, type_name in types.items():
        layer, kind = block_of(name)
        if layer is None:
            console.print(Text.assemble(_cell(type_name), f" {visible(_short(name))}: {type_name}"), soft_wrap=True)
        else:
            rows.setdefault(visible(_short(kind)), {})[layer] = type_name
    names = sorted(rows, key=kind_order)
    margin = 1 + min(_MAX_KIND, max(map(len, names), default=0))
    n_layer = 1 + max((layer for row in rows.values() for layer in row), default=-1)
    n_columns = max(10, (console.width - margin) // 10 * 10)
    for start in range(0, n_layer, n_columns):
        layers = range(start, min(n_layer, start + n_columns))
        console.print()
        ruler = "".join(f"{layer:<10}" for layer in layers if layer % 10 == 0)
        console.print(Text(f"{'layer':<{margin}}{ruler}".rstrip()), soft_wrap=True)
        for name in names:
            console.print(_row(f"{name[:_MAX_KIND]:<{margin}}", rows[name], layers), soft_wrap=True)


def _row(name: str, types: Mapping[int, str], layers: Iterable[int]) -> Text:
    from rich.text import Text

    return Text.assemble(name, *(_cell(types.get(layer)) for layer in layers))


def _cell(type_name: str | None) -> tuple[str, str]:
    """A character and its style: whole bits per weight, F for 16 and more, a dot where there is no tensor."""
    from colorsys import hls_to_rgb

    from dynrun.gguf.tensor_types import TENSOR_TYPES

    if type_name is None:
        return ".", "dim"
    bits = TENSOR_TYPES[type_name].bpw
    warmth = min(1.0, max(0.0, (bits - _COLD) / (_HOT - _COLD)))
    # From blue over green to red; light, so that black can be read on it.
    red, green, blue = (round(255 * c) for c in hls_to_rgb((1 - warmth) * 2 / 3, 0.7, 0.8))
    return (str(int(bits)) if bits < 10 else "F"), f"black on #{red:02x}{green:02x}{blue:02x}"


def _legend(of_types: Iterable[Share]) -> Table:
    from rich.text import Text

    from dynrun.gguf.tensor_types import TENSOR_TYPES

    table = _table("", "type", "bits per weight", "tensors", "MB", right=(2, 3, 4))
    for share in of_types:
        size = "?" if share.nbytes is None else f"{share.nbytes / 1e6:,.2f}"
        bits = f"{TENSOR_TYPES[share.type].bpw:.4g}"
        table.add_row(Text(*_cell(share.type)), share.type, bits, str(share.n_tensors), size)
    return table


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in right else "left")
    return table


def _short(name: str) -> str:
    return name.removesuffix(".weight")


# -- diff --------------------------------------------------------------------------------------------------------------


def _show_diff(found: Difference) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for letter, side in (("A", found.a), ("B", found.b)):
        size = "" if side.nbytes is None else f"; tensors {megabytes(side.nbytes)}"
        bits = "" if side.bpw is None else f", {side.bpw:.3f} bits per weight"
        text = f"{letter}: {side.opened.path.name}: {_about(side.scheme)}{size}{bits}"
        console.print(Text(visible(text)), soft_wrap=True)
    changes = found.changes()
    n = sum(change.n_tensors for change in changes)
    console.print(Text(f"{n} tensors differ, {found.n_same} are the same"), soft_wrap=True)
    if changes:
        console.print()
        console.print(_changes(changes))
    for letter, key in (("A", "a"), ("B", "b")):
        if names := _groups(found, key):
            console.print(Text(f"only in {letter}: {names}"), soft_wrap=True)


def _groups(found: Difference, key: str) -> str:
    from dynrun.scheme_diff import group

    names = found.only["a" if key == "a" else "b"]
    parts = group({name: found.types[name] for name in names})
    return visible("; ".join(f"{_place(c.kind, c.layers)} {c.before or c.after}" for c in parts))


def _place(kind: str, layers: str) -> str:
    return f"{_short(kind)} {layers}" if layers else _short(kind)


def _changes(changes: Iterable[Change]) -> Table:
    from rich.text import Text

    table = _table("tensor", "A", "B", "tensors", "layers", right=(3,))
    for change in changes:
        kind, layers = Text(visible(_short(change.kind))), Text(change.layers)
        table.add_row(kind, change.before, change.after, str(change.n_tensors), layers)
    return table
