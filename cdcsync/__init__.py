"""cdcsync keeps a vector index in step with PostgreSQL tables."""

__version__ = "0.1.0"
