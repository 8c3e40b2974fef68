"""Running a model: a llama-server child, and what is asked of it."""
