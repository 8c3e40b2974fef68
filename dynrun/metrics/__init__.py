"""Pure arithmetic on measured numbers: summaries and their confidence intervals."""
