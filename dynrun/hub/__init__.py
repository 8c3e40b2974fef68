"""Models on the Hugging Face Hub: what a name means there, and how files get here whole."""
