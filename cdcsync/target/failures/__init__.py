"""target/failures."""
