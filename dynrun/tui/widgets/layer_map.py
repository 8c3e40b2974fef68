"""Where each layer lies: a column a layer, a row a memory."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text

from dynrun.runtime.residence import CPU, Residence
from dynrun.tui.planning import rows_of
from dynrun.tui.widgets.placement_view import PlacementView

# A layer, a layer without its experts, its experts alone, nothing.
_WHOLE, _WITHOUT, _EXPERTS, _NOTHING = "█", "▄", "▒", "·"
_NAME = 7


class LayerMap(PlacementView):
    """Layers are drawn one a cell, or several where there are more than cells; the last cell is the output."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"map--device", "map--ram", "map--quiet"}
    DEFAULT_CSS = """
    LayerMap {
        height: auto;
        .map--device { color: $primary; }
        .map--ram { color: $accent; }
        .map--quiet { text-style: dim; }
    }
    """

    def render(self) -> Text:
        if self._shown is None:
            return Text()
        where = self._shown.residence
        style = self.get_component_rich_style
        n = len(where.layer_on)
        each = max(1, -(-n // max(self.content_size.width - _NAME - 2, 1)))
        said = f"{n} layers{f', {each} a cell' if each > 1 else ''}, output"
        legend = f"  {_WITHOUT} without experts  {_EXPERTS} experts alone" if where.experts_in_ram else ""
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{'':{_NAME}}{said}{legend}", style("map--quiet", partial=True))
        for name, index, _, _ in rows_of(self._shown):
            kind = "map--ram" if index == CPU else "map--device"
            text.append(f"\n{name[: _NAME - 1]:{_NAME}}")
            text.append(cells(where, index, each), style(kind, partial=True))
        return text


def cells(where: Residence, device: int, each: int) -> str:
    """A memory's row, ``each`` layers a cell; where they differ, the first of them counts."""
    drawn = "".join(_cell(where, device, layer) for layer in range(0, len(where.layer_on), each))
    return f"{drawn} {_WHOLE if where.output_on == device else _NOTHING}"


def _cell(where: Residence, device: int, layer: int) -> str:
    here, experts = where.layer_on[layer] == device, where.experts_on(layer) == device
    if here and experts:
        return _WHOLE
    if here:
        return _WITHOUT
    return _EXPERTS if experts else _NOTHING
