from cdcsync.config import Config
from cdcsync.config import load as load_config
from cdcsync.embedders import Embedder
from cdcsync.errors import (
    CdcsyncError,
    ConfigError,
    EmbedderSetupError,
    EmbedderUnavailable,
    EmbedError,
    GapError,
    LeaseLost,
    ModelChanged,
    NotReached,
    RunError,
    SetupError,
    SourceUnavailable,
    TargetUnavailable,
    TextRejected,
    Unavailable,
    UsageError,
)
from cdcsync.index import Hits, Index
from cdcsync.target.search import Hit
from cdcsync.worker.run import run as run_worker

__version__: str

__all__ = [
    "CdcsyncError",
    "Config",
    "ConfigError",
    "EmbedError",
    "Embedder",
    "EmbedderSetupError",
    "EmbedderUnavailable",
    "GapError",
    "Hit",
    "Hits",
    "Index",
    "LeaseLost",
    "ModelChanged",
    "NotReached",
    "RunError",
    "SetupError",
    "SourceUnavailable",
    "TargetUnavailable",
    "TextRejected",
    "Unavailable",
    "UsageError",
    "__version__",
    "load_config",
    "run_worker",
]
