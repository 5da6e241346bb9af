"""flows/setup."""
