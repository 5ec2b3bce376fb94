"""What a name must mean, as far as its one client knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class State:
    """A name's versions by number, and which is current; nothing at all once it is deleted."""

    versions: dict[int, str] = field(default_factory=dict)
    """Digest by number."""
    current: int | None = None
    previous: int | None = None

    def pointed(self, number: int) -> State:
        """The same versions with another current one."""
        if number == self.current:
            return self
        return replace(self, current=number, previous=self.current)


@dataclass
class Ledger:
    """One name. Its changes come one after the other, so only the last may be in doubt."""

    name: str
    state: State = State()
    last_number: int = 0
    doubtful: State | None = None
    """What the name means if a change took place that was sent and never answered."""

    def uploaded(self, digest: str) -> State:
        """The state after an upload."""
        for number, known in self.state.versions.items():
            if known == digest:
                return self.state.pointed(number)
        number = self.last_number + 1
        after = replace(self.state, versions={**self.state.versions, number: digest})
        return after.pointed(number)

    def without(self, number: int) -> State:
        """The state after a version was deleted that is not current."""
        versions = {n: digest for n, digest in self.state.versions.items() if n != number}
        previous = None if self.state.previous == number else self.state.previous
        return replace(self.state, versions=versions, previous=previous)

    def settle(self, state: State) -> None:
        """Take a state for true."""
        self.state = state
        self.last_number = max(self.last_number, *state.versions, 0)
        self.doubtful = None

    def judge(self, found: State) -> list[str]:
        """What is wrong with what a restarted server says the name means. Then it is taken so."""
        problems = []
        if found not in (self.state, self.doubtful):
            problems.append(
                f"{self.name}: is {found}, acknowledged was {self.state}, in doubt {self.doubtful}"
            )
        self.settle(found)
        return problems

    def lost(self, found: State) -> int:
        """How many acknowledged versions are missing from what was found."""
        kept = set(self.state.versions.items())
        if self.doubtful is not None:  # it may have been a delete
            kept &= self.doubtful.versions.items()
        return len(kept - found.versions.items())
