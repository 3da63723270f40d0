"""Weight patches: their format, how they are made, carried and applied."""
