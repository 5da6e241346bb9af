"""The commands of `config`: the file in effect, and what a deployment is made of.

Examples, roles, units, alerts and manifests stand at the root of a checkout; a wheel holds them below `cdcsync/shipped`
(setup.py). Single files go to standard output; several files are written into a directory, under the paths by which
they name each other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import cdcsync
from cdcsync.cli.commands import ConfigOption, Invocation, print_help_instead
from cdcsync.errors import UsageError
from cdcsync.process.files import write_files

COMPOSE = ("config/alerts.yml", "config/dashboard.json", "config/roles.sql", "docker")
"""compose.yaml mounts files of config/ by their place beside it."""

KUBERNETES = ("config/alerts.yml", "config/roles.sql", "deploy/kubernetes")

commands = typer.Typer()
config_commands = typer.Typer(help="Show the configuration in effect, or describe every key of one.")
commands.add_typer(config_commands, name="config")

DirectoryArgument = Annotated[
    Path, typer.Argument(metavar="DIRECTORY", help="Where to write the files; it is made if need be.")
]


def shipped(name: str) -> Path:
    """Return where a file or folder is, named by its path in the repository."""
    package = Path(cdcsync.__file__).parent
    packaged = package / "shipped"
    return (packaged if packaged.is_dir() else package.parent) / name


@config_commands.callback(invoke_without_command=True)
def _before_a_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print_help_instead(context)


@config_commands.command()
def show(context: typer.Context, config: ConfigOption = None) -> None:
    """Print the file in effect: every key, defaults filled in, secrets hidden."""
    from cdcsync.config import render

    print(render(context.ensure_object(Invocation).load(config)), end="")


@config_commands.command(epilog="For completion in an editor: `cdcsync config schema > cdcsync.schema.json`")
def schema() -> None:
    """Print the JSON schema of a configuration file, which describes every key."""
    from cdcsync import config

    print(json.dumps(config.schema(), indent=2, ensure_ascii=False))


@config_commands.command(epilog="Start from it: `cdcsync config example > cdcsync.toml`")
def example() -> None:
    """Print an example of a configuration file, which explains every key."""
    _print("config/cdcsync.example.toml")


@config_commands.command(
    epilog="""`cdcsync config roles > roles.sql`

    `psql -d shop -v source_role=cdcsync -v target_role=cdcsync -v tables=public.articles -f roles.sql`"""
)
def roles() -> None:
    """Print a psql script that creates the worker's roles with the least privileges that they need."""
    _print("config/roles.sql")


@config_commands.command(epilog="`cdcsync config systemd > /etc/systemd/system/cdcsync.service`")
def systemd(
    template: Annotated[
        bool, typer.Option("--template", help="The unit cdcsync@.service, for several pipelines on one machine.")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="The unit of the tool server, `cdcsync serve`.")] = False,
) -> None:
    """Print a systemd unit, for the worker unless an option names another."""
    if template and serve:
        raise UsageError(
            "--template and --serve cannot be combined", where="config systemd", hint="print one unit at a time"
        )
    name = "cdcsync-serve" if serve else "cdcsync@" if template else "cdcsync"
    _print(f"config/{name}.service")


@config_commands.command(epilog="`cdcsync config alerts > /etc/prometheus/cdcsync.yml`, named there under `rule_files`")
def alerts() -> None:
    """Print alert rules for Prometheus."""
    _print("config/alerts.yml")


@config_commands.command(epilog="To import it in Grafana: `cdcsync config dashboard > cdcsync.json`")
def dashboard() -> None:
    """Print a dashboard for Grafana."""
    _print("config/dashboard.json")


@config_commands.command(epilog="`cdcsync config compose shop`; the first lines of shop/docker/compose.yaml continue")
def compose(directory: DirectoryArgument) -> None:
    """Write a compose file with PostgreSQL, the worker, Prometheus and Grafana, and all that it mounts."""
    _write(COMPOSE, directory)


@config_commands.command(epilog="`cdcsync config kubernetes .`; deploy/kubernetes/README.md continues")
def kubernetes(directory: DirectoryArgument) -> None:
    """Write manifests for Kubernetes: a worker with a standby, probes, disruption budget, PodMonitor."""
    _write(KUBERNETES, directory)


def _print(name: str) -> None:
    sys.stdout.write(shipped(name).read_text(encoding="utf-8"))


def _write(names: tuple[str, ...], directory: Path) -> None:
    """Copy files and folders below a directory, and print what was written.

    :raises UsageError: one of the files is there already, or cannot be written; then none is.
    """
    root = shipped("")
    found = [path for name in names for path in ([shipped(name)] if shipped(name).is_file() else _files(shipped(name)))]
    copies = {directory / path.relative_to(root): (path.read_bytes(), path.stat().st_mode & 0o777) for path in found}
    try:
        write_files(copies)
    except FileExistsError as error:
        raise UsageError(
            "the file exists already, and nothing was written",
            where=str(error.filename),
            hint="name another directory, or move the file away",
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot be written: {error.strerror}; nothing was",
            where=str(error.filename),
            hint="name a directory that you may write to, on a disk that is not full",
        ) from error
    for target in copies:
        print(target)


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != ".env" and "__pycache__" not in path.parts
    )
