"""``python -m benchmarks.fuzz``: see the package's docstring.

The last line printed is JSON. The exit status is 1 if anything failed or was accepted that should
not have been.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz import contract, conversions, files, wire
from benchmarks.fuzz.serving import serving
from benchmarks.provenance import provenance, save
from server.observability.logs import configure_logging

_MOST_SHOWN = 20
_KEPT = Path("runs/fuzz")


@dataclass(frozen=True)
class Options:
    """How much, and from which seed."""

    seed: int = 0
    max_examples: int = 400
    """Cases that Schemathesis draws of each route, and sequences of them."""
    schema_seconds: int = 300
    """Time that it takes: where cases are left over, it draws more of them."""
    num_bodies: int = 10_000
    num_files: int = 120_000
    num_folders: int = 3000
    num_workers: int = 2


def run(options: Options) -> dict[str, Any]:
    """All attacks; what each found is printed, and the sum returned."""
    began_at = time.monotonic()
    problems: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="reft-fuzz-") as folder,
        serving(Path(folder)) as target,
    ):
        drawn = contract.attack(
            target,
            seed=options.seed,
            max_examples=options.max_examples,
            max_time_s=options.schema_seconds,
        )
        print(f"{drawn.cases} cases drawn from the document", flush=True)
        shots = wire.attack(target, seed=options.seed, num_random=options.num_bodies)
        print(f"{shots.cases} broken requests", flush=True)
        problems += [*drawn.problems, *shots.problems]
        problems += [f"left behind: {what}" for what in target.leftovers()]
        if not target.is_alive():
            problems.append("the server does not answer any more")
    tally = files.attack_all(options.seed, options.num_files, options.num_workers, progress=True)
    files.keep(_KEPT, options.seed, tally.problems)
    problems += [f"file {options.seed}:{index}, {what}" for index, what in tally.problems]
    folders = conversions.attack(seed=options.seed, count=options.num_folders)
    problems += folders.problems
    return {
        "cases": drawn.cases + shots.cases,
        "server_errors": drawn.server_errors + shots.server_errors,
        "files": tally.files,
        "accepted_bad": tally.accepted_bad,
        "accepted": tally.accepted,
        "served": tally.served,
        "folders": folders.files,
        "converted": folders.converted.total(),
        "problems": problems,
        "answers": dict(sorted(drawn.statuses.items())),
        "accepted_by_damage": dict(tally.by_damage),
        "seconds": round(time.monotonic() - began_at, 1),
    }


def main() -> int:
    """Run, save and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--no-save", action="store_true", help="leave results/fuzz.json alone")
    arguments = vars(parser.parse_args())
    is_saved = not arguments.pop("no_save")
    options = Options(**arguments)
    configure_logging("error", "console")
    found = run(options)
    if is_saved:
        save("fuzz", {"provenance": provenance(), "options": asdict(options), **found})
    problems = found.pop("problems")
    for line in problems[:_MOST_SHOWN]:
        print(line)
    if len(problems) > _MOST_SHOWN:
        print(f"and {len(problems) - _MOST_SHOWN} more")
    del found["answers"], found["accepted_by_damage"]
    print(json.dumps({**found, "problems": len(problems)}))
    return int(bool(problems or found["server_errors"]))


if __name__ == "__main__":
    sys.exit(main())
