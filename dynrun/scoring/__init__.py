"""Divergence of whatever the engine has loaded from the reference's logits."""
