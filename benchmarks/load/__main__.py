"""``python -m benchmarks.load``: see the package's docstring.

The last line printed is JSON. The exit status is 1 if anything was lost, wrong or left behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from benchmarks.load.run import Options, run
from benchmarks.provenance import provenance, save
from server.observability.logs import configure_logging

_LAST_LINE = ("requests", "lost", "wrong_adapter", "http_over_engine")


def main() -> int:
    """Run, print and save; the exit status."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=defaults.model, help="tiny, demo, hub id or folder")
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--connections", type=int, default=defaults.connections)
    parser.add_argument("--streams", type=int, default=defaults.streams)
    parser.add_argument("--repeats", type=int, default=defaults.repeats)
    parser.add_argument("--num-files", type=int, default=defaults.num_files)
    parser.add_argument("--num-prompts", type=int, default=defaults.num_prompts)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--name", default="load", help="of the file in results/; empty: none")
    arguments = vars(parser.parse_args())
    name = arguments.pop("name")
    options = Options(**arguments)
    configure_logging("warning", "console")
    summary = run(options)
    for line in (*summary["problems"], *summary["leaks"]):
        print(line)
    if name:
        document: dict[str, object] = {**provenance(), "options": asdict(options), **summary}
        print(f"saved to {save(name, document)}")
    print(json.dumps({key: summary.get(key) for key in _LAST_LINE}))
    return int(bool(summary["lost"] or summary["wrong_adapter"] or summary["leaks"]))


if __name__ == "__main__":
    sys.exit(main())
