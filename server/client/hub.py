"""Adapters on their way to a hub, each with its model card and the report of its training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from reft_core.adapter import Adapter, read_adapter
from reft_core.card import CARD, PAGE, model_card, repository
from reft_core.errors import InvalidRequest, ReftError
from reft_core.hub import ADAPTER_FILE, is_unreachable
from reft_core.names import HUB_PATTERN

_MAIN = "main"
_REFUSED = {
    401: "the hub does not know the token; `hf auth login` takes another",
    403: "the token may not write there; it needs the permission to write to this repository",
    404: "there is no such repository that the token may see",
}


def push_to_hub(
    file: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
) -> str:
    """Put an adapter file into a hub's repository, which is made if there is none.

    The card and the page beside the file go along if they are this adapter's, so that a card may
    be edited; else a card is written. Returns the address of the commit. Raises
    :class:`ReftError` with what to do about it.
    """
    if not re.fullmatch(HUB_PATTERN, repo) or "@" in repo:
        raise InvalidRequest.because("hub", repo, "OWNER/NAME")
    adapter = read_adapter(file)
    api = HfApi()
    if get_token() is None:
        raise ReftError("hub: there is no token; `hf auth login` keeps one, or set HF_TOKEN")
    contents: dict[str, str | bytes] = {
        ADAPTER_FILE: file.read_bytes(),
        "README.md": _card(file, adapter, repo, base_model),
    }
    if (page := _beside(file, PAGE, adapter)) is not None:
        contents[PAGE] = page
    operations = [
        CommitOperationAdd(name, text if isinstance(text, bytes) else text.encode())
        for name, text in contents.items()
    ]
    with _in_words(api.endpoint, repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision not in (None, _MAIN):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        commit = api.create_commit(
            repo,
            operations,
            commit_message=f"{adapter.spec.name} {adapter.digest[:12]}",
            revision=revision,
        )
    return str(commit.commit_url)


def _card(file: Path, adapter: Adapter, repo: str, base_model: str | None) -> str:
    """The card beside the file, its repository's name filled in, or a new one."""
    own = None if base_model else _beside(file, CARD, adapter)
    if own is None:
        return model_card(adapter, repo, base_model)
    return own.replace(repository(adapter.spec), repo)


def _beside(file: Path, name: str, adapter: Adapter) -> str | None:
    """The text of another file in the folder, if it tells of this adapter."""
    path = file.with_name(name)
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return text if adapter.digest in text else None


@contextmanager
def _in_words(endpoint: str, repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into a :class:`ReftError` of one line."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = _REFUSED.get(status) or error.server_message or f"status {status}"
        raise ReftError(f"hub: {repo}: {reason}") from None
    except OfflineModeIsEnabled:
        raise ReftError("hub: HF_HUB_OFFLINE is set, which forbids to upload") from None
    except ValueError as error:  # of the card's front matter
        raise ReftError(f"hub: {repo}: {' '.join(str(error).split())}") from None
    except RuntimeError as error:  # while a large file was sent
        raise ReftError(f"hub: {repo}: {error} ({error.__cause__})") from None
    except Exception as error:
        if is_unreachable(error):
            raise ReftError(f"hub: no connection to {endpoint} ({error})") from None
        raise
