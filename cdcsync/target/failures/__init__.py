"""Rows and texts that failed.

    documents     rows that no document could be made of
    listing       both, as `cdcsync failures` shows them

A file imports only from lines above its own.
"""
