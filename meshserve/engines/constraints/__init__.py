"""What outputs must keep to, through the grammar library: JSON Schema, expressions, choices. For engines, and for the processor."""
