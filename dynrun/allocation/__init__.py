"""Allocation: one tensor type per tensor, least predicted KLD within a byte budget."""
