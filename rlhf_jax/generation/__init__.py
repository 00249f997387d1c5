"""Floor 3: text from a model."""
