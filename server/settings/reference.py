"""The page of all settings, from their class: ``python -m server.settings.reference FILE``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from server.settings.fields import all_fields

_HEADING = """\
# Settings

Written from the settings' class by `make docs`. Each is a flag of `reft serve`, an environment
variable, or a line of the file that `--config` (or `REFT_CONFIG`) names, in this order of
precedence; those without a flag are secrets, which a command line would show to other users.

```yaml
# reft.yaml
model: Qwen/Qwen2.5-0.5B-Instruct
adapters: [adapters/]     # relative paths count from this file's folder
max_num_seqs: 32
```

`reft config init` writes a file with all of them commented out, `reft config show` prints those
that are in effect and where each came from. A key that is no setting, and a value out of its
range, end the start with one line that names it.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([_HEADING, *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    yield "| setting | flag | what it is | may be | default |"
    yield "|---|---|---|---|---|"
    for field in all_fields().values():
        flag = f"`{field.flag}`" if field.flag else "none"
        yield (
            f"| `{field.name}`<br>`{field.variable}` | {flag} | {field.description} "
            f"| {field.allowed} | {field.shown(field.default)} |"
        )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
