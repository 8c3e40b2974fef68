"""How feedback is made, in what all of its stages share, and the name that a file's metadata gives it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dynrun.artifacts import key_of

# Counts up when the same settings give other bytes.
REVISION = 4


@dataclass(frozen=True)
class FeedbackSettings:
    """``strengths``: the best is sought downhill on held-out activations; the covariance is shrunk toward its diagonal
    as by s·n tokens of independent columns, n its width. ``damping`` in units of the mean diagonal; ``n_rows`` of a
    tensor, of at most ``n_experts``, decide on both, and on whether feedback is worth it. ``sweeps`` over all columns
    after the first."""

    strengths: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)
    damping: float = 1e-3
    n_rows: int = 64
    n_experts: int = 4
    sweeps: int = 1

    def key(self) -> str:
        """Content address."""
        return key_of({**asdict(self), "revision": REVISION})

    def text(self, covariance: str, n_ctx: int) -> str:
        """What a scheme and a file's metadata say: with the imatrix's calibration enough to make the same bytes."""
        strengths = "/".join(f"{strength:g}" for strength in self.strengths)
        how = f"strengths {strengths}, damping {self.damping:g}, {self.n_rows} rows, {self.n_experts} experts"
        return f"covariance {covariance}, n_ctx {n_ctx}; {how}, {self.sweeps} sweeps; r{REVISION}"

    def shrinkage(self, strength: float, n_columns: int, n_tokens: float) -> float:
        """Part of the off-diagonal covariance that is given up, in [0, 1]; all of it where there are no tokens."""
        prior = strength * n_columns
        return prior / (prior + n_tokens) if prior > 0 else 0.0
