"""The index in the target: its tables, what is written to them, and how they are searched."""
