"""Reads a Dockerfile into stages of instructions: as much of the language as ours uses.

What it does not know (heredocs, ONBUILD, ADD, other shells) is refused, not skipped.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
    *("RUN", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, ``--flag=value`` options, and the rest as written."""

    name: str
    flags: dict[str, str]
    value: str
    line: int

    @property
    def words(self) -> list[str]:
        """The rest as a list: of its JSON form if it has one, else of its words."""
        if self.value.startswith("["):
            return list(json.loads(self.value))
        return shlex.split(self.value)

    @property
    def pairs(self) -> dict[str, str]:
        """The rest as ``name=value`` pairs; a name alone means nothing, in the empty string."""
        parts = (word.partition("=") for word in shlex.split(self.value))
        return {name: value for name, _, value in parts}


@dataclass(frozen=True)
class Stage:
    """What follows one FROM."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Dockerfile:
    """Arguments before the first FROM, with their defaults, and the stages in order."""

    arguments: dict[str, str]
    stages: dict[str, Stage]

    def lineage(self, target: str) -> list[Stage]:
        """The stages that ``target`` stands on, the lowest first, itself last."""
        found: list[Stage] = []
        while target in self.stages:
            found.insert(0, self.stages[target])
            target = found[0].base
        return found

    def needed(self, target: str) -> list[Stage]:
        """Every stage that building ``target`` takes, in the file's order."""
        wanted, queue = set[str](), [target]
        while queue:
            name = queue.pop()
            if name in wanted or name not in self.stages:
                continue
            wanted.add(name)
            stage = self.stages[name]
            queue += [stage.base, *(i.flags.get("from", "") for i in stage.instructions)]
        return [stage for name, stage in self.stages.items() if name in wanted]


def read(path: Path) -> Dockerfile:
    """The Dockerfile at ``path``. Raises ValueError for what is not known here."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for instruction in _instructions(path.read_text()):
        if instruction.name == "FROM":
            base, _, name = re.split(r"\s+(as)\s+", instruction.value, flags=re.IGNORECASE)
            current = stages[name] = Stage(name, substitute(base, arguments))
        elif current is not None:
            current.instructions.append(instruction)
        elif instruction.name == "ARG":
            arguments |= instruction.pairs
        else:
            raise ValueError(f"line {instruction.line}: {instruction.name} before FROM")
    return Dockerfile(arguments, stages)


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with ``$NAME``, ``${NAME}`` and ``${NAME:-default}`` replaced."""
    return _VARIABLE.sub(
        lambda found: variables.get(found[1] or found[2], "") or found[3] or "", text
    )


def _instructions(text: str) -> Iterator[Instruction]:
    """Every instruction, its continued lines joined and comments left out."""
    parts: list[str] = []
    began = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not parts and not line.strip()):
            continue
        began = began if parts else number
        parts.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        yield _instruction("".join(parts).strip(), began)
        parts = []
    if parts:
        raise ValueError(f"line {began}: continued past the end of the file")


def _instruction(text: str, line: int) -> Instruction:
    """One logical line."""
    name, _, rest = text.partition(" ")
    if name not in KNOWN or (name in ("RUN", "COPY") and "<<" in rest):
        raise ValueError(f"line {line}: {text[:40]!r} is not understood here")
    flags = {}
    rest = rest.strip()
    while found := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        flags[found[1]] = found[2]
        rest = rest[found.end() :]
    return Instruction(name, flags, rest, line)
