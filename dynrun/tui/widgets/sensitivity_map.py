"""Which tensors matter: a row a kind of tensor, a column a layer, darker where the same error costs more KLD."""

from __future__ import annotations

import math
from typing import ClassVar

from rich.text import Text
from textual.geometry import Size
from textual.widget import Widget

from dynrun.scheme_types import block_of, kind_order
from dynrun.tui.making import UnitProbed

# By eighths of the range from the least slope to the greatest, on a logarithmic scale: legible without colours.
_SHADES = "·░░▒▒▓▓█"
_NAME = 14


class SensitivityMap(Widget):
    """Fills while probes come; the middle one of a tensor's probes counts where there are several."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"sensitivity--cell", "sensitivity--quiet"}
    DEFAULT_CSS = """
    SensitivityMap {
        height: auto;
        .sensitivity--cell { color: $warning; }
        .sensitivity--quiet { text-style: dim; }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._slopes: dict[tuple[int | None, str], list[float]] = {}

    def clear(self) -> None:
        """Nothing was probed."""
        self._slopes.clear()
        self.refresh(layout=True)

    def add(self, probed: UnitProbed) -> None:
        """One more probe. A group's name is no tensor's: it has a cell of its own."""
        new = (key := block_of(probed.unit)) not in self._slopes
        self._slopes.setdefault(key, []).append(probed.slope)
        self.refresh(layout=new)

    def slope(self, layer: int | None, kind: str) -> float | None:
        """What is shown of a tensor; None where it was not probed."""
        found = sorted(self._slopes.get((layer, kind), ()))
        return found[len(found) // 2] if found else None

    def _kinds(self) -> list[str]:
        return sorted({kind for layer, kind in self._slopes if layer is not None}, key=kind_order)

    def _others(self) -> list[str]:
        return sorted(kind for layer, kind in self._slopes if layer is None)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._kinds()) + bool(self._others()) + 1 if self._slopes else 0

    def render(self) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        if not self._slopes:
            return text
        style = self.get_component_rich_style
        values = [s for one in self._slopes for s in [self.slope(*one)] if s]
        least, most = min(values, default=1.0), max(values, default=1.0)
        n_layers = 1 + max((layer for layer, _ in self._slopes if layer is not None), default=-1)
        text.append(
            f"KLD per unit of error, {least:.2g} {_SHADES} {most:.2g}", style("sensitivity--quiet", partial=True)
        )
        for kind in self._kinds():
            row = "".join(self._cell(layer, kind, least, most) for layer in range(n_layers))
            text.append(f"\n{kind.removesuffix('.weight')[: _NAME - 1]:{_NAME}}")
            text.append(row, style("sensitivity--cell", partial=True))
        if others := self._others():
            shown = "  ".join(f"{one.removesuffix('.weight')} {self._cell(None, one, least, most)}" for one in others)
            text.append(f"\n{shown}")
        return text

    def _cell(self, layer: int | None, kind: str, least: float, most: float) -> str:
        slope = self.slope(layer, kind)
        if slope is None:
            return " "
        if slope <= 0 or most <= least:
            return _SHADES[0]
        part = math.log(slope / least) / math.log(most / least)
        return _SHADES[min(int(part * len(_SHADES)), len(_SHADES) - 1)]
