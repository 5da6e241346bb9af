"""Puts what an operator deploys with into the package; everything else is described in pyproject.toml.

The example configuration, units, alerts, manifests and the like stand at the root of the repository, where people look
for them. A wheel holds the same files below `cdcsync/shipped`, from where `cdcsync config` prints them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ("config", "deploy", "docker")


class BuildWithShippedFiles(build_py):
    """Copies the shipped files beside the modules. An editable install reads them where they are."""

    def run(self) -> None:
        """Build the modules, then copy the files."""
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped().items():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that a build writes."""
        return [*super().get_outputs(include_bytecode), *self._shipped().values()]

    def _shipped(self) -> dict[str, str]:
        """Return where each file is copied to."""
        package = Path(self.build_lib, "cdcsync", "shipped")
        files = sorted(path for name in SHIPPED for path in (ROOT / name).rglob("*") if _belongs(path))
        return {str(path): str(package / path.relative_to(ROOT)) for path in files}


def _belongs(path: Path) -> bool:
    """Return whether a file is one of the repository, and not what somebody's use of it left there."""
    return path.is_file() and path.name != ".env" and "__pycache__" not in path.parts


setup(cmdclass={"build_py": BuildWithShippedFiles})
