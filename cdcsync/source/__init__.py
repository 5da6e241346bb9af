"""The source server: its slot, its catalog and its tables."""
