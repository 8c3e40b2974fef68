"""Schemes: what a person reads is what is read back, and slips are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.errors import NotFoundError, UsageError
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.scheme import (
    Scheme,
    check_architecture,
    expanded,
    fitting_label,
    parse,
    read_scheme,
    render,
    sha256,
    write_scheme,
)

SCHEME = Scheme(
    types={
        "token_embd.weight": "Q4_K",
        **{f"blk.{i}.attn_q.weight": "Q3_K" if i in (0, 1, 2, 3, 5) else "IQ4_NL" for i in range(12)},
        **{f"blk.{i}.ffn_down.weight": "Q5_K" for i in range(12)},
    },
    label="Q3_K_M",
    architecture="llama",
    source="demo",
    source_sha256="ab" * 32,
    budget_bytes=94_000_000,
    size_bytes=93_999_968,
    predicted_kld=0.0625,
    calibration="builtin 0123abcd",
    imatrix_sha256="cd" * 32,
    llama_cpp_commit="0c1e570",
    dynrun="0.1.0",
)
TEXT = render(SCHEME)
COMMITTED = Path(__file__).resolve().parents[2] / "schemes"

_TYPES = st.sampled_from(DEFAULT_MENU)
_ANY_NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_OUTSIDE = st.dictionaries(_ANY_NAME.filter(lambda name: not name.startswith("blk.")), _TYPES, max_size=4)
_KINDS = st.dictionaries(
    st.one_of(st.sampled_from(["attn_q.weight", "ffn_down_exps.weight"]), _ANY_NAME.filter(bool)),
    st.dictionaries(st.integers(0, 40), _TYPES, min_size=1),
    max_size=4,
)
# Of six significant digits, as the file has them.
_ROUNDED = st.floats(0, 1e30).map(lambda number: float(f"{number:.6g}"))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    types = draw(_OUTSIDE)
    for kind, layers in draw(_KINDS).items():
        types |= {f"blk.{layer}.{kind}": type_name for layer, type_name in layers.items()}
    points = st.tuples(_ROUNDED, _ROUNDED)
    return replace(
        SCHEME,
        types=types,
        slopes={name: tuple(draw(st.lists(points, min_size=1, max_size=3))) for name in list(types)[:3]},
        measured_kld=draw(st.none() | st.floats(0, 1e300)),
        probe_tokens=draw(st.none() | st.integers(0, 2**40)),
        source=draw(_ANY_NAME),
        size_bytes=draw(st.integers(0, 2**50)),
        predicted_kld=draw(st.floats(0, 1e300)),
    )


@given(schemes())
@settings(deadline=None)
def test_what_is_rendered_is_read_back(scheme: Scheme) -> None:
    assert parse(render(scheme), where="s.toml", tensors=scheme.types) == scheme


@given(schemes())
@settings(deadline=None)
def test_order_of_the_tensors_changes_no_byte(scheme: Scheme) -> None:
    turned = replace(scheme, types=dict(reversed(list(scheme.types.items()))))
    assert render(turned) == render(scheme)
    assert sha256(turned) == sha256(scheme)


def test_layers_are_grouped_for_a_reader() -> None:
    lines = TEXT.splitlines()
    assert lines[:4] == ["[scheme]", "format = 1", 'label = "Q3_K_M"', 'architecture = "llama"']
    assert '"token_embd.weight" = "Q4_K"' in lines
    at = lines.index('[types."blk.*.attn_q.weight"]')
    assert lines[at + 1 : at + 3] == ['Q3_K = "0-3, 5"', 'IQ4_NL = "4, 6-11"']
    assert lines[-2:] == ['[types."blk.*.ffn_down.weight"]', 'Q5_K = "0-11"']


def test_the_mixture_is_told_in_a_comment() -> None:
    assert (
        "# Tensors of each type (bits per weight): 5 Q3_K (3.438), 7 IQ4_NL (4.5), 1 Q4_K (4.5), 12 Q5_K (5.5)" in TEXT
    )


def test_another_type_makes_another_hash() -> None:
    other = replace(SCHEME, types={**SCHEME.types, "token_embd.weight": "Q5_K"})
    assert len(sha256(SCHEME)) == 64
    assert sha256(other) != sha256(SCHEME)


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "schemes" / "demo.toml"
    write_scheme(SCHEME, path)
    assert read_scheme(path, SCHEME.types) == SCHEME
    assert read_scheme(path) == SCHEME


def test_a_person_may_write_ranges_in_any_order_and_a_block_tensor_by_its_name() -> None:
    text = TEXT.replace('IQ4_NL = "4, 6-11"', 'IQ4_NL = "7-11,6"').replace(
        '"token_embd.weight" = "Q4_K"', '"token_embd.weight" = "Q4_K"\n"blk.4.attn_q.weight" = "IQ4_NL"'
    )
    assert parse(text, where="s.toml", tensors=SCHEME.types) == SCHEME


# What is changed in the text, into what, and what the error must name: the place, and the way out.
SLIPS = {
    "invalid TOML": ('label = "Q3_K_M"', "label = Q3_K_M", ["not valid TOML", "line 3"]),
    "number too long": ("budget_bytes = 94000000", f"budget_bytes = {'9' * 5000}", ["not valid TOML"]),
    "nested too deep": ("budget_bytes = 94000000", f"budget_bytes = {'[' * 5000}", ["not valid TOML"]),
    "key twice": ("format = 1", "format = 1\nformat = 1", ["not valid TOML"]),
    "later format": ("format = 1", "format = 2\nnovelty = 3", ["[scheme]", "format 2", "reads format 1"]),
    "format of another type": ("format = 1", "format = true", ["[scheme]", "format True"]),
    "no format": ("format = 1\n", "", ["[scheme]", "'format' is missing"]),
    "unknown table": ("[types]", "[typos]\n[types]", ["'typos'", "'types'"]),
    "no head": ("[scheme]", "[shceme]", ["'shceme'", "'scheme'"]),
    "misspelt key": ("budget_bytes", "budget_byte", ["[scheme]", "'budget_byte'", "'budget_bytes'"]),
    "label with a slash": ('"Q3_K_M"', '"../Q3"', ["[scheme] label", "slashes"]),
    "label too long": ('"Q3_K_M"', f'"{"é" * 64}"', ["[scheme] label", "127 bytes"]),
    "number that no float holds": ("0.0625", "9" * 400, ["[scheme] predicted_kld", "finite"]),
    "string for a number": ("94000000", '"94000000"', ["[scheme] budget_bytes", "an integer"]),
    "flag for a number": ("94000000", "true", ["[scheme] budget_bytes", "an integer"]),
    "number for a string": ('"0.1.0"', "0.1", ["[scheme] dynrun", "a string"]),
    "negative size": ("94000000", "-1", ["[scheme] budget_bytes", "not negative"]),
    "KLD not a number": ("0.0625", "nan", ["[scheme] predicted_kld", "finite"]),
    "unknown type outside": ('"Q4_K"', '"Q4_KM"', ['"token_embd.weight"', "'Q4_KM'", "'Q4_K'"]),
    "unknown type in a block": ("IQ4_NL = ", "iq4_nl = ", ["blk.*.attn_q.weight", "'iq4_nl'", "'IQ4_NL'"]),
    "type of no weight": ('"Q4_K"', '"I8"', ["'I8'"]),
    "type that is no string": ('"Q4_K"', "4", ['"token_embd.weight"', "a string"]),
    "unknown tensor": ("token_embd", "token_embed", ["'token_embed.weight'", "'token_embd.weight'"]),
    "unknown kind": ("attn_q", "attn_qq", ["blk.*.attn_qq.weight", "attn_q.weight'"]),
    "unknown layer": ("6-11", "6-12", ["IQ4_NL", "'blk.12.attn_q.weight'", "'blk.11.attn_q.weight'"]),
    "missing layers": ("4, 6-11", "4, 6-9", ["'blk.10.attn_q.weight' and 1 more"]),
    "missing tensor": ('"token_embd.weight" = "Q4_K"\n', "", ["'token_embd.weight' has no type"]),
    "twice in two types": ("4, 6-11", "4-11", ["IQ4_NL", "'blk.5.attn_q.weight'", "Q3_K already"]),
    "twice in one type": ("0-3, 5", "0-3, 2, 5", ["Q3_K", "'blk.2.attn_q.weight' is named twice"]),
    "twice by name": ("[types]", '[types]\n"blk.0.attn_q.weight" = "Q8_0"', ["'blk.0.attn_q.weight' is named twice"]),
    "backward range": ("6-11", "11-6", ["attn_q.weight", "'11-6'", '"0-3, 5"']),
    "range of words": ("6-11", "all", ["'all'"]),
    "empty range": ("4, 6-11", "", ["''"]),
    "open range": ("6-11", "6-", ["'6-'"]),
    "negative layer": ("0-3, 5", "-1", ["'-1'"]),
    "layer of a million": ("6-11", "6-1000000", ["'6-1000000'"]),
    "other digits": ("6-11", "٦-١١", ["no layer"]),
    "layers that are no string": ('"4, 6-11"', "[4, 6]", ["IQ4_NL", "a string"]),
    "all layers of no kind": (
        "[types]",
        '[types]\n"blk.*.attn_qq.weight" = "Q4_K"',
        ["'blk.*.attn_qq.weight'", "'blk.*.attn_q.weight'"],
    ),
    "unknown default": ("[types]", '[types]\ndefault = "Q4_K_M"', ['"default"', "'Q4_K_M'", "'Q4_K'"]),
    "an empty kind": ("[types]", '[types."blk.*.attn_k.weight"]\n[types]', ["blk.*.attn_k.weight", "empty"]),
    "an unquoted tensor": ('"token_embd.weight"', "token_embd.weight", ["[types.", "quoted"]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named_with_its_place_and_a_way_out(slip: str) -> None:
    before, after, named = SLIPS[slip]
    assert before in TEXT
    with pytest.raises(UsageError) as caught:
        parse(TEXT.replace(before, after, 1), where="my.toml", tensors=SCHEME.types)
    line = str(caught.value)
    assert line.startswith("my.toml")
    assert "\n" not in line
    for part in named:
        assert part in line


def test_a_scheme_for_no_model_in_particular_may_name_any_tensor() -> None:
    text = TEXT.replace("token_embd", "token_embed")
    assert parse(text, where="s.toml").types["token_embed.weight"] == "Q4_K"


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.toml does not exist"):
        read_scheme(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_scheme(tmp_path / "binary.toml")


def test_a_name_that_no_text_file_can_hold_is_still_written(tmp_path: Path) -> None:
    write_scheme(replace(SCHEME, source="model-\udcff"), tmp_path / "s.toml")
    assert read_scheme(tmp_path / "s.toml").source == "model-?"


def test_another_architecture_is_refused() -> None:
    check_architecture(SCHEME, "llama", Path("a.gguf"))
    with pytest.raises(UsageError, match=r"b\.gguf is a qwen2 model and the scheme is for llama"):
        check_architecture(SCHEME, "qwen2", Path("b.gguf"))


SHORT = """
[scheme]
format = 1

[types]
default = "Q4_K"
"blk.*.attn_q.weight" = "Q3_K"
"blk.3.attn_q.weight" = "Q6_K"

[types."blk.*.ffn_down.weight"]
Q5_K = "0-1"
"""


def test_a_short_scheme_made_by_hand_names_every_tensor_of_a_model() -> None:
    scheme = parse(SHORT, where="some/folder/mine.scheme.toml", tensors=SCHEME.types)
    assert scheme.label == "mine"
    assert scheme.rules == {}
    assert scheme.types == {
        "token_embd.weight": "Q4_K",
        **{f"blk.{i}.attn_q.weight": "Q6_K" if i == 3 else "Q3_K" for i in range(12)},
        **{f"blk.{i}.ffn_down.weight": "Q5_K" if i < 2 else "Q4_K" for i in range(12)},
    }


def test_what_a_short_scheme_does_not_say_is_unknown_and_not_invented() -> None:
    scheme = parse(SHORT, where="mine.toml")
    assert (scheme.architecture, scheme.source, scheme.size_bytes, scheme.predicted_kld) == ("", "", 0, None)
    assert render(scheme).startswith('[scheme]\nformat = 1\nlabel = "mine"\n\n[types]\n')
    check_architecture(scheme, "whatever", Path("a.gguf"))


def test_rules_stay_as_they_are_until_the_model_is_known() -> None:
    scheme = parse(SHORT, where="mine.toml")
    assert scheme.rules == {"default": "Q4_K", "blk.*.attn_q.weight": "Q3_K"}
    assert scheme.types == {f"blk.{i}.ffn_down.weight": "Q5_K" for i in (0, 1)} | {"blk.3.attn_q.weight": "Q6_K"}
    assert parse(render(scheme), where="other.toml") == scheme
    assert expanded(scheme, SCHEME.types) == parse(SHORT, where="mine.toml", tensors=SCHEME.types)


SLOPES = {"blk.10.attn_q.weight": ((0.25, 1.5e-05),), "blk.2.attn_q.weight": ((0.1234567, 0.01), (0.5, -1e-12))}


def test_slopes_come_last_a_line_for_each_tensor_with_six_digits() -> None:
    text = render(replace(SCHEME, slopes=SLOPES, measured_kld=0.0675, probe_tokens=65536))
    assert text.splitlines()[-2:] == [
        '"blk.2.attn_q.weight" = [[0.123457, 0.01], [0.5, -1e-12]]',
        '"blk.10.attn_q.weight" = [[0.25, 1.5e-05]]',
    ]
    assert text.index("[slopes]") > text.index("[types.")
    read = parse(text, where="s.toml", tensors=SCHEME.types)
    assert read.slopes["blk.2.attn_q.weight"][0] == (0.123457, 0.01)
    assert (read.measured_kld, read.probe_tokens) == (0.0675, 65536)
    assert replace(read, slopes={}, measured_kld=None, probe_tokens=None) == SCHEME


@pytest.mark.parametrize(
    "slopes",
    [
        *("[]", '"x"', "[0.1, 0.2]", "[[0.1]]", "[[0.1, 0.2, 0.3]]", '[["0.1", 0.2]]', "[[nan, 0.1]]"),
        *("[[0.1, inf]]", "[[-0.1, 0.2]]", "[[true, 0.2]]", f"[[0.1, {'9' * 400}]]"),
    ],
)
def test_slopes_that_are_no_points_are_refused(slopes: str) -> None:
    text = f'{TEXT}\n[slopes]\n"token_embd.weight" = {slopes}\n'
    with pytest.raises(UsageError, match=r'^my\.toml, \[slopes\] "token_embd\.weight" .*\[\[error, KLD\]'):
        parse(text, where="my.toml", tensors=SCHEME.types)


def test_slopes_of_a_tensor_that_the_model_has_not_are_refused() -> None:
    text = f'{TEXT}\n[slopes]\n"blk.12.attn_q.weight" = [[0.1, 0.2]]\n'
    with pytest.raises(UsageError, match=r"\[slopes\].*'blk\.11\.attn_q\.weight'"):
        parse(text, where="my.toml", tensors=SCHEME.types)


@pytest.mark.parametrize(
    ("text", "label"), [("Q4_K_M", "Q4_K_M"), ("../x\ny", ".._x_y"), ("", "?"), ("é" * 100, "é" * 63)]
)
def test_somebodys_label_is_made_fit_for_a_file_name(text: str, label: str) -> None:
    assert fitting_label(text) == label
    assert parse(render(replace(SCHEME, label=label)), where="s.toml").label == label


def test_a_file_without_types_is_refused() -> None:
    with pytest.raises(UsageError, match="'types' is missing"):
        parse("[scheme]\nformat = 1\n", where="s.toml")


@pytest.mark.parametrize("path", sorted(COMMITTED.rglob("*.toml")), ids=lambda path: path.name)
def test_a_committed_scheme_is_what_this_version_would_write(path: Path) -> None:
    assert render(read_scheme(path)) == path.read_text(encoding="utf-8")
