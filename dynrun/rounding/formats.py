"""Slabs that ggml quantized, opened so that their codes are chosen again beside the scales that ggml set.

Knows which module opens which type; the scales, the feedback and the order of the columns are the caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dynrun.rounding.scalar import LAYOUTS, ScalarCodes, open_scalar

if TYPE_CHECKING:
    import torch


class Codes(Protocol):
    """A slab quantized by ggml whose scales stand and whose codes are chosen again."""

    width: int  # columns that are decided together: 1 of scalar types, 4 or 8 of those with codebooks

    def choose(self, first: int, x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """Choose the codes of columns ``first`` … ``first + width``, and return the values of these codes.

        ``x`` float32 [width, n_rows] is what the columns should be, ``metric`` float32 [width, width] the quadratic
        form whose value at x − values every row should make small. Values: float32 [width, n_rows], bit-equal to what
        ggml's dequantizer gives for :meth:`data`. Groups may be chosen again.
        """

    def data(self) -> npt.NDArray[np.uint8]:
        """The slab's bytes [n_rows, bytes per row] with the codes chosen so far, all others as ggml set them."""


def open_codes(type_name: str, data: npt.NDArray[np.uint8], n_rows: int, n_columns: int, device: str) -> Codes | None:
    """Open ``data``, ``n_rows`` × ``n_columns`` values in a tensor type, on a torch device.

    None for a type whose codes cannot be chosen again. Raises ValueError where ``data`` has another size.
    """
    if (codes := open_scalar(type_name, data, n_rows, n_columns, device)) is not None:
        return codes
    # Imported here as its grids take a moment to unpack.
    from dynrun.rounding.codebooks import open_codebook

    return open_codebook(type_name, data, n_rows, n_columns, device)


def width_of(type_name: str) -> int | None:
    """Columns that are decided together in a type; None where its codes cannot be chosen again."""
    if type_name in LAYOUTS:
        return ScalarCodes.width
    from dynrun.rounding import grids

    return grids.LAYOUTS[type_name].width if type_name in grids.LAYOUTS else None
