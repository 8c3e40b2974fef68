"""One widget a file; widgets show, they start no work."""
