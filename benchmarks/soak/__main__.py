"""``python -m benchmarks.soak``: see the package's docstring.

The last line printed is JSON. The exit status is 1 if anything was lost, wrong or left behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from benchmarks.soak.run import Options, run
from server.observability.logs import configure_logging

_MOST_SHOWN = 20


def main() -> int:
    """Run and print; the exit status."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=defaults.model, help="tiny, demo, hub id or folder")
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--num-files", type=int, default=defaults.num_files)
    parser.add_argument("--max-rss-growth-mb", type=float, default=defaults.max_rss_growth_mb)
    options = Options(**vars(parser.parse_args()))
    configure_logging("warning", "console")
    summary = run(options)
    problems = summary.pop("problems")
    for line in problems[:_MOST_SHOWN]:
        print(line)
    if len(problems) > _MOST_SHOWN:
        print(f"and {len(problems) - _MOST_SHOWN} more")
    print(json.dumps({**asdict(options), **summary}))
    return int(bool(summary["lost"] or summary["wrong"] or summary["leaks"]))


if __name__ == "__main__":
    sys.exit(main())
