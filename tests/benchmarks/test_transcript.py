from __future__ import annotations

from benchmarks.transcript import ADDRESS, PAGE, cells, lm_eval_part
from server.cli.demo import EXAMPLES


def test_the_page_has_every_part_of_the_example() -> None:
    source = (EXAMPLES / "openai_client.py").read_text()
    assert ADDRESS in source
    page = PAGE.read_text()
    parts = cells(source)
    assert len(parts) == source.count("# %%")
    for title, code in parts:
        assert f"### {title}\n\n```python\n{code}\n```\n\n```text\n" in page, "make transcript"


def test_the_page_has_what_lm_eval_found() -> None:
    assert lm_eval_part() in PAGE.read_text(), "make transcript"


def test_cells() -> None:
    assert cells('"""Doc."""\n# %% One\na = 1\n\n# %% Two\nb\nc\n') == [
        ("One", "a = 1"),
        ("Two", "b\nc"),
    ]
