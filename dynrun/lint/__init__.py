"""Known faults in a GGUF's metadata and shapes."""
