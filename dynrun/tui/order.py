"""What the Make room orders, and what it gets: plain data that goes to a child process and comes back as JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynrun.stages import Settings
    from dynrun.target import Target

# Presets to choose from before the sizes of this model are known.
LABELS = ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")


@dataclass(frozen=True)
class Order:
    """``what``: ``make`` or ``curve``. ``size``: a label, or bytes; ``menu`` and ``calibration`` as the command takes
    them; ``tokens`` to calibrate on."""

    what: str
    model: str
    size: str | int
    menu: str = "all"
    calibration: str = "builtin"
    tokens: int = 32768
    feedback: bool = True

    def target(self) -> Target:
        from dynrun.target import Target

        return Target(quant=self.size) if isinstance(self.size, str) else Target(size_bytes=self.size)

    def settings(self) -> Settings:
        """Raises UsageError for a menu that is none."""
        from dynrun.config import load_config
        from dynrun.gguf.tensor_types import parse_menu
        from dynrun.stages import Settings

        usual = Settings(calibration=self.calibration, menu=parse_menu(self.menu), config=load_config())
        usual = replace(usual, imatrix=replace(usual.imatrix, n_tokens=self.tokens))
        return usual if self.feedback else replace(usual, feedback=None)

    def command(self) -> str:
        """The same from a shell, for the report."""
        import shlex

        size = ["--quant", self.size] if isinstance(self.size, str) else ["--size", str(self.size)]
        more = ["--types", self.menu, "--calibration", self.calibration, "--tokens", str(self.tokens)]
        return shlex.join(["dynrun", "make", self.model, *size, *more, *([] if self.feedback else ["--no-feedback"])])


@dataclass(frozen=True)
class Measured:
    """A file and its divergence: the row of the table. ``same_top_p`` in [0, 1], ``ci95`` of the mean."""

    name: str
    size_bytes: int
    bpw: float
    kld: float
    ci95: tuple[float, float]
    p99: float
    same_top_p: float
    ppl: float


@dataclass(frozen=True)
class Result:
    """What `make` ended with. ``ratio``: of the KLDs, with its interval; None where the stock preset's is 0."""

    file: str
    report: str
    rows: tuple[Measured, ...]
    predicted_kld: float | None
    ratio: tuple[float, float, float] | None


@dataclass(frozen=True)
class CurveResult:
    """Sizes in bytes with their predicted KLD, smallest first; bytes of the stock presets by name."""

    rows: tuple[tuple[int, float], ...]
    presets: tuple[tuple[str, int], ...]
