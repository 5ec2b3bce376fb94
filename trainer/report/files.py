"""The files of a report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from reft_core.adapter import write_durably
from reft_core.card import CARD, PAGE, model_card
from trainer.report.document import to_document
from trainer.report.page import render_page

if TYPE_CHECKING:
    from trainer.train import TrainResult

DOCUMENT = "report.json"


def write_report(result: TrainResult) -> None:
    """Write :data:`DOCUMENT`, :data:`PAGE` and :data:`CARD` into the run's report folder."""
    folder, document = result.config.report_dir, to_document(result)
    text = json.dumps(document, indent=1, ensure_ascii=False)
    write_durably(folder / DOCUMENT, text.encode())
    write_durably(folder / PAGE, render_page(document).encode())
    write_durably(folder / CARD, model_card(result.adapter).encode())
