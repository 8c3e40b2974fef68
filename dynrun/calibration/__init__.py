"""From conversations to token sequences, and what the model's weights see of them."""
