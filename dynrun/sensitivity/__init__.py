"""How much the model's divergence grows with the error of each tensor, and the error of every type on it."""
