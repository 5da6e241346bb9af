"""The tool server: searches for applications and agents, over HTTP and MCP.

    request ─► who is it? ─► may it, now? ─► one statement under its claims ─► answer ─► one row in the audit

It is a process apart from the worker, keeps no state of its own, and runs in any number of replicas. HTTP and MCP are
two skins of `Service`, which every call goes through.

    problems      answers that say what to change (RFC 9457)
    identity      tokens in a file, signed tokens, and what they claim
    limits        how much a tenant may ask for, and when everybody is told to come back
    calls         the record of calls
    messages      requests and answers
    budget        keeps the answers to agents short
    visibility    the rows and columns that a caller may see
    exposure      what leads the server's role past the rows of its callers' tenants
    offered       an index: searches and documents under a caller's claims
    reader        the indexes, which share connections and models
    service       one call: who, limits, deadline, timer, record
    openapi       the API described for programs
    http          routes
    mcp           tools for agents
    stdio         standard input that ends with its client, or at a signal
    run           the process

A file here imports only from lines above its own.
"""
