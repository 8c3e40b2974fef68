"""Words out of somebody's file, made harmless for a page, a card and a terminal; and how reports write numbers."""

from __future__ import annotations

import re

from markupsafe import Markup

_SPECIAL = re.compile(r"([\\`*_{}\[\]#!|~$^])")


def visible(text: str) -> str:
    """``text`` with what is not printable (escape sequences, line ends, marks that turn the text round) written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def markdown(value: object) -> str:
    """``value`` as text in Markdown, whatever it holds; :class:`Markup` stands as it is."""
    if isinstance(value, Markup):
        return str(value)
    text = visible(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", text)


def code_span(value: object) -> Markup:
    """``value`` between backticks, in a table too."""
    text = visible(str(value))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|"))  # noqa: S704 - this is the escaping


def code_block(value: object) -> Markup:
    """``value`` as a fenced block of shell, line by line."""
    lines = [visible(line) for line in str(value).split("\n")]
    runs = [len(run) for line in lines for run in re.findall("`+", line)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return Markup("\n".join([f"{fence}sh", *lines, fence]))  # noqa: S704 - this is the escaping


def size(n_bytes: int) -> str:
    """Bytes as people read them, in units of a thousand as shops and the Hub count."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def kld(value: float) -> str:
    """Nats per token with about four significant digits."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 1 else f"{value:.3f}" if abs(value) >= 1 else f"{value:.3g}"


def kld_with(mean: float, ci95: tuple[float, float]) -> str:
    """A mean KLD and its 95% interval."""
    return f"{kld(mean)} ({kld(ci95[0])}–{kld(ci95[1])})"


def ratio_with(value: float, ci95: tuple[float, float] | None) -> str:
    """A ratio and its 95% interval, where that is known."""
    return f"{value:.3f}" + (f" ({ci95[0]:.3f}–{ci95[1]:.3f})" if ci95 else "")
