"""The common part of this package's HTTP servers, which are the worker's endpoints and the tool server.

    headers      headers that shut off what a browser could be tricked into, on every answer
    listening    addresses, bounded connections, and a server inside of another program

A file here imports only from lines above its own.
"""
