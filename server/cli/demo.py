"""``reft demo``: the example adapters on a real model, and curl lines to try them."""

from __future__ import annotations

import secrets
from pathlib import Path

from reft_core.errors import InvalidRequest
from server.cli.errors import console
from server.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"

_TRIES = (
    ("the base model", None, "My parcel was due on Monday and it is still not here."),
    ("the intent adapter", "intent", "My parcel was due on Monday and it is still not here."),
    ("the sentiment adapter", "sentiment", "The soup was cold and the waiter shrugged."),
)


def demo_settings(model: str, host: str, port: int, data_dir: Path) -> Settings:
    """Settings of the demo: the example adapters, and an admin key made for this run.

    An admin key in the environment is kept.
    """
    adapters = tuple(sorted(EXAMPLES.glob("*/*.safetensors")))
    if not adapters:
        raise InvalidRequest.because(
            "examples", str(EXAMPLES), "adapter files; the demo runs from a clone of the project"
        )
    given = Settings(model=model, host=host, port=port, data_dir=data_dir, adapters=adapters)
    if given.admin_key is not None:
        return given
    key = secrets.token_urlsafe(24)
    return Settings.model_validate(given.model_dump(exclude_defaults=True) | {"admin_key": key})


def announce_tries(settings: Settings, base_name: str, url: str) -> None:
    """Print lines to copy, how to administer, and how to stop."""
    for title, name, text in _TRIES:
        body = (
            f'{{"model": "{name or base_name}", "temperature": 0, "max_tokens": 40,\n'
            f'       "messages": [{{"role": "user", "content": "{text}"}}]}}'
        )
        console.print(f"\n[bold]# {title}[/]")
        console.print(
            f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"  -d '{body}'",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    assert settings.admin_key is not None
    console.print(
        f"\n# admin key of this run: {settings.admin_key.get_secret_value()}\n"
        f"curl -s {url}/admin/adapters -H "
        f"'Authorization: Bearer {settings.admin_key.get_secret_value()}'\n\n"
        "Press Ctrl-C to stop.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
