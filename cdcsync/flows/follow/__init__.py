"""flows/follow."""
