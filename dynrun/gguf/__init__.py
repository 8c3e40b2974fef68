"""GGUF files: headers, tensor types, weights."""
