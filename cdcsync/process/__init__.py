"""What concerns the process itself, in whichever command it runs.

    collector      Python's garbage collector
    crashpoints    named points at which tests kill it
    files          files that are written whole or not at all
    memory         how much memory it may use, and how large a value may be
    terminals      text from elsewhere, made safe for a terminal
    threads        threads that load or run a model, read a file or ask a name server, which nobody has to wait for
    stopping       signals: Ctrl-C, once and twice, and those before the start

A file imports only from lines above its own.
"""
