"""The report of a run: one JSON document, drawn as a page for people and told as a model card."""

from trainer.report.files import write_report

__all__ = ["write_report"]
