"""What concerns the process itself, in whichever command it runs.

    collector      Python's garbage collector
    crashpoints    named points at which tests kill it
    files          files that are written whole or not at all
    memory         how much memory it may use, and how large a value may be
    stopping       signals: Ctrl-C, once and twice, and those before the start
    terminals      text from elsewhere, made safe for a terminal
    threads        threads that load or run a model or read a file, which nobody has to wait for

None of these files imports another one.
"""
