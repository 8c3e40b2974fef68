"""How good a file is, measured against its reference."""
