"""dynrun's own two themes; Textual's are there too."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="dynrun-dark",
    primary="#7aa2f7",
    secondary="#3d59a1",
    accent="#e0af68",
    success="#73c991",
    warning="#e0af68",
    error="#f7768e",
    foreground="#d5d9e8",
    background="#14161f",
    surface="#1a1d29",
    panel="#242838",
    dark=True,
    variables={"footer-key-foreground": "#e0af68", "border": "#3d59a1"},
)
LIGHT = Theme(
    name="dynrun-light",
    primary="#2f5bb7",
    secondary="#6d8bd0",
    accent="#9a5b00",
    success="#1d7a46",
    warning="#9a5b00",
    error="#b3263e",
    foreground="#20242f",
    background="#f6f7fa",
    surface="#eceef4",
    panel="#dfe3ec",
    dark=False,
    variables={"footer-key-foreground": "#9a5b00", "border": "#6d8bd0"},
)
THEMES = (DARK, LIGHT)
