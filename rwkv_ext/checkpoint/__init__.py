"""Checkpoint files: names at the border, sizes inferred from shapes, strict in both directions."""
