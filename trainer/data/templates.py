"""Prompts for rows that bring none: plain text whose last token is the trigger.

The label directly follows the token that an ``l1`` rule edits. A chat template puts more between
the two, and a small model guesses worse behind it.
"""

from __future__ import annotations

from reft_core.spec import TemplateSpec

LABEL_TEMPLATE = TemplateSpec(user="Text: {content}\n", generation="Label:")
"""Of rows with a text and a label."""

PLAIN_TEMPLATE = TemplateSpec(generation="")
"""Of a base without a chat template: each message on a line."""


def label_lead(template: TemplateSpec) -> str:
    """What goes between a prompt and its label: a space, where the prompt ends in none.

    Tokenizers join a word with the space before it, and models have seen ``Label: x`` so.
    """
    end = template.generation or template.user
    return "" if end[-1:].isspace() else " "
