"""The table of tensor types, against the compiled library."""

from __future__ import annotations

import pytest

from dynrun.gguf.tensor_types import TENSOR_TYPES, TensorType
from dynrun.llamacpp.library import ggml

pytestmark = pytest.mark.native


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_rows_are_as_large_as_the_library_says(kind: TensorType) -> None:
    for row_length in (kind.block_size, 3 * kind.block_size, 4096):
        assert kind.nbytes(row_length) == ggml().ggml_row_size(kind.ggml_id, row_length)
    assert ggml().ggml_type_name(kind.ggml_id).decode().upper() == kind.name


@pytest.mark.parametrize("row_length", [576, 768])
def test_a_table_of_rows_adds_up(row_length: int) -> None:
    for kind in TENSOR_TYPES.values():
        if kind.fits(row_length):
            assert kind.nbytes(7 * row_length) == 7 * ggml().ggml_row_size(kind.ggml_id, row_length)
