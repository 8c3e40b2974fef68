"""Statistics of an imatrix on cases with a known answer, and their picture."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.imatrix import Imatrix
from dynrun.calibration.imatrix_plot import draw
from dynrun.calibration.imatrix_stats import TensorStatistics, block_and_kind, layer_statistics, statistics
from dynrun.errors import UsageError


def only(sums: list[list[float]], counts: list[float], name: str = "blk.0.attn_q.weight") -> TensorStatistics:
    (row,) = statistics(Imatrix({name: np.array(sums)}, {name: np.array(counts)}))
    return row


def test_even_columns_have_full_entropy_and_no_spread() -> None:
    row = only([[6.0] * 8], [2.0])
    assert (row.total, row.least, row.greatest, row.mean, row.stddev) == (24, 3, 3, 3, 0)
    assert (row.n, row.entropy, row.entropy_share, row.zd, row.active) == (8, 3, 1, 0, 1)
    assert (row.block, row.tensor) == (0, "attn_q")


def test_one_loud_column_has_no_entropy_and_stands_out() -> None:
    row = only([[0.0, 0.0, 0.0, 8.0]], [2.0])
    assert (row.entropy, row.entropy_share, row.zd, row.active) == (0, 0, 0.25, 0.25)


def test_experts_without_tokens_do_not_count() -> None:
    row = only([[2.0, 2.0], [0.0, 0.0], [8.0, 8.0]], [1.0, 0.0, 2.0], "blk.0.ffn_up_exps.weight")
    assert (row.n, row.total) == (4, 12)


def test_a_weight_without_tokens_has_no_row() -> None:
    assert statistics(Imatrix({"w": np.zeros((1, 2))}, {"w": np.zeros(1)})) == []


def test_silent_and_single_columns_give_numbers() -> None:
    silent, single = only([[0.0, 0.0]], [1.0]), only([[3.0]], [1.0])
    assert (silent.total, silent.entropy, silent.zd, silent.cos_sim) == (0, 0, 0, 0)
    assert (single.entropy_share, single.stddev) == (0, 0)


def two_layers() -> Imatrix:
    sums = {
        "blk.0.attn_q.weight": np.array([[1.0, 0.0]]),
        "blk.1.attn_q.weight": np.array([[3.0, 3.0]]),
        "blk.1.ffn_up_exps.weight": np.array([[2.0, 2.0], [2.0, 2.0]]),
        "output.weight": np.array([[9.0, 9.0]]),
    }
    counts = {name: np.ones(len(array)) for name, array in sums.items()}
    return Imatrix(sums, counts, ("some $ text",))


def test_similarity_is_to_the_same_weight_one_block_earlier() -> None:
    rows = {row.weight: row for row in statistics(two_layers())}
    assert rows["blk.1.attn_q.weight"].cos_sim == pytest.approx(np.sqrt(0.5))
    assert [rows[n].cos_sim for n in ("blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight", "output.weight")] == [0, 0, 0]


def test_rows_come_by_kind_with_the_greatest_total_first() -> None:
    order = ["blk.1.attn_q.weight", "blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight", "output.weight"]
    assert [row.weight for row in statistics(two_layers())] == order


def test_layers_are_weighed_by_columns_and_leave_out_what_is_in_no_block() -> None:
    first, second = layer_statistics(statistics(two_layers()))
    assert (first.block, first.total) == (0, 1)
    assert (second.block, second.total) == pytest.approx((1, (2 * 6 + 4 * 8) / 6))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.12.ffn_down.weight", (12, "ffn_down")),
        ("output.weight", (None, "output")),
        ("v.blk.3.attn_q.weight", (3, "attn_q")),
        ("odd", (None, "odd")),
        ("blk", (None, "blk")),
        ("blk.x.y", (None, "blk.x.y")),
    ],
)
def test_block_and_kind_are_read_from_the_name(name: str, expected: tuple[int | None, str]) -> None:
    assert block_and_kind(name) == expected


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw(two_layers(), tmp_path / "i.png", min_tokens=5)
    width, height = png_size(tmp_path / "i.png")
    assert 600 < width < 3200
    assert 400 < height < 1800
    assert [path.name for path in tmp_path.iterdir()] == ["i.png"]


def test_the_picture_of_a_great_model_is_no_giant(tmp_path: Path) -> None:
    names = [f"blk.{i}.ffn_up_exps.weight" for i in range(80)]
    counts = np.arange(256.0)
    imatrix = Imatrix({n: np.ones((256, 2)) * counts[:, None] for n in names}, dict.fromkeys(names, counts))
    draw(imatrix, tmp_path / "i.png")
    width, height = png_size(tmp_path / "i.png")
    assert max(width, height) <= 3200


def test_nothing_in_any_block_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        draw(Imatrix({"output.weight": np.ones((1, 2))}, {"output.weight": np.ones(1)}), tmp_path / "i.png")
    assert not (tmp_path / "i.png").exists()
