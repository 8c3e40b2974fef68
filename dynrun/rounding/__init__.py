"""Rounding with error feedback inside stock tensor types."""
