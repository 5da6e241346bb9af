"""The stream flow: from the slot to the target, exactly once.

    prepare       changes into documents, chunks and the vectors that are at hand
    stream        receive, batch, apply, acknowledge

A file imports only from lines above its own.
"""
