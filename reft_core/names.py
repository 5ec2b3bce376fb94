"""Forms of names, known without torch."""

HUB_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?$"
"""A repository of a hub, and behind an @ one of its revisions."""
