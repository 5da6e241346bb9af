"""Pin the images that docker/Dockerfile and docker/compose.yaml build on: `make pin-images`.

A tag such as `18` names another image every week. This asks a container engine which one it is today, and writes the
digests to docker/images.env, by which `docker build` and `docker compose` take exactly those:

    docker compose --env-file images.env --env-file .env up --build
    docker build --build-arg "$(grep ^PYTHON_IMAGE= docker/images.env)" …

The engine needs the network, or the images; CDCSYNC_ENGINE names one other than docker or podman.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PINS = HERE / "images.env"

HEAD = "# Written by `make pin-images`: the images by digest, as of when it ran.\n"


def wanted() -> dict[str, str]:
    """Return the images that the files name, by the variable that replaces each."""
    found = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", (HERE / "Dockerfile").read_text(), re.MULTILINE))
    return found | dict(re.findall(r"image: \$\{(\w+_IMAGE):-([^}]+/[^}]+)\}", (HERE / "compose.yaml").read_text()))


def engine() -> list[str]:
    """Return the command of an engine; ends the program where there is none."""
    if named := os.environ.get("CDCSYNC_ENGINE"):
        return shlex.split(named)
    for name in ("docker", "podman"):
        if (path := shutil.which(name)) is not None:
            return [path]
    sys.exit("error: no container engine\nfix:   install docker or podman, or name one in CDCSYNC_ENGINE")


def digest(command: list[str], image: str) -> str:
    """Return an image with the digest that its tag has today; ends the program if the engine cannot say."""
    inspect = [*command, "image", "inspect", "--format", "{{range .RepoDigests}}{{println .}}{{end}}", image]
    for asked in ([*command, "pull", "--quiet", image], inspect):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            sys.exit(f"error: {shlex.join(asked[:3])} {image}: {last}\nfix:   see that the registry can be reached")
    digests = re.findall(r"@(sha256:[0-9a-f]{64})\s", done.stdout)
    if not digests:
        sys.exit(f"error: {image} has no digest\nfix:   it was built here: pull it from a registry")
    return f"{image.partition('@')[0]}@{digests[0]}"


def main() -> None:
    """Write the pins."""
    command = engine()
    pins = {name: digest(command, image) for name, image in wanted().items()}
    PINS.write_text(HEAD + "".join(f"{name}={image}\n" for name, image in pins.items()))
    sys.stdout.write(PINS.read_text())


if __name__ == "__main__":
    main()
