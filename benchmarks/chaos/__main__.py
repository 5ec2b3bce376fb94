"""``python -m benchmarks.chaos``: see the package's docstring.

The last line printed is JSON; the same goes to ``results/chaos-<backend>.json``. The exit status
is 1 if anything acknowledged was lost, anything half-written was seen, or a name meant something
that it never should.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from benchmarks.chaos.backends import BACKENDS
from benchmarks.chaos.run import Options, run
from benchmarks.provenance import provenance, save
from server.observability.logs import configure_logging

_MOST_SHOWN = 20


def main() -> int:
    """Run and print; the exit status."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=defaults.kills)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--backend", choices=BACKENDS, default=defaults.backend)
    parser.add_argument("--clients", type=int, default=defaults.clients)
    parser.add_argument("--longest-s", type=float, default=defaults.longest_s)
    parser.add_argument("--no-save", action="store_true", help="write no file into results/")
    given = vars(parser.parse_args())
    is_saved = not given.pop("no_save")
    options = Options(**given)
    configure_logging("warning", "console")
    summary = run(options)
    problems = summary.pop("problems")
    for line in problems[:_MOST_SHOWN]:
        print(line)
    document = {**asdict(options), **summary, "problems": len(problems)}
    if is_saved:
        facts = provenance()
        facts["command"] = f"python -m benchmarks.chaos {' '.join(sys.argv[1:])}".strip()
        save(f"chaos-{options.backend}", {**document, "provenance": facts})
    print(json.dumps(document))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
