"""The build context: tracked files that .dockerignore lets through."""

from __future__ import annotations

import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path


class Context:
    """Files of ``project`` that a build would be sent."""

    def __init__(self, project: Path) -> None:
        self._project = project
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=project,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rules = _rules((project / ".dockerignore").read_text())
        self.files = [name for name in listed.split("\0") if name and _is_sent(name, rules)]

    def matching(self, source: str) -> list[str]:
        """The files that COPY of ``source`` takes: it, or all below it. Raises if none."""
        source = source.removeprefix("./").rstrip("/")
        found = [name for name in self.files if name == source or name.startswith(f"{source}/")]
        if not found:
            raise FileNotFoundError(f"COPY {source}: not in the build context")
        return found

    def copy(self, source: str, target: Path, *, into: bool) -> None:
        """Copy as COPY does: a file into or as ``target``, a folder's contents into it."""
        source = source.removeprefix("./").rstrip("/")
        for name in self.matching(source):
            below = name.removeprefix(source).lstrip("/")
            place = target / (below or (Path(name).name if into else ""))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._project / name, place)


def _rules(text: str) -> list[tuple[bool, str]]:
    """Whether a file is sent, and the pattern of files that it is said of."""
    lines = (line.strip() for line in text.splitlines())
    kept = [line for line in lines if line and not line.startswith("#")]
    return [(line.startswith("!"), line.removeprefix("!")) for line in kept]


def _is_sent(name: str, rules: list[tuple[bool, str]]) -> bool:
    """The last pattern that fits a file or a folder it is in decides."""
    sent = True
    path = Path(name)
    for says, pattern in rules:
        anywhere = pattern.startswith("**/")
        places = path.parts if anywhere else map(str, (path, *path.parents))
        if any(fnmatch(place, pattern.removeprefix("**/")) for place in places):
            sent = says
    return sent
