"""Image files: the only reader and writer."""
