"""The process: what `cdcsync run` runs.

    history       what it remembers of the last hour
    readings      whether the target answers
    state         the worker as others see it
    gauges        what the metrics show of the two servers
    systemd       readiness, reload and watchdog messages
    descriptors   as many open files as the system allows
    streaming     following the slot, over any number of connections
    pipeline      the parts of a pipeline and how they are connected
    http          health, status, metrics and the status page
    reload        reading the configuration again
    run           the worker's life
    substitute    a worker for the time of one command, if none runs

A file imports only from lines above its own.
"""
