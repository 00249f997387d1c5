"""Floor 2: tokens to numbers."""
