"""The logical replication protocol as pure functions: bytes in, frozen messages out.

    wire       the cursor over one message's bytes; PostgreSQL's clock
    frames     what a walsender wraps messages in, and what it wants to hear back
    messages   one frozen struct per message of the `pgoutput` plugin
    decode     bytes of one message → its struct

Nothing here opens a socket, reads a clock or remembers anything between two calls: which relation an OID
means, and whether a streamed block is open, is the caller's to know.

Source: PostgreSQL, "Streaming Replication Protocol" and "Logical Replication Message Formats".
"""
