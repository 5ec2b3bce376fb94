"""What a request's answer may look like, token by token."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """One answer's form, as far as the answer has come; serves one request.

    Used by the engine's thread alone. What a method raises ends its request, and no other.
    """

    @property
    def lark(self) -> str:
        """All of the form as a grammar in llguidance's Lark notation, for an engine that has a
        matcher of its own."""

    def allowed(self) -> Tensor:
        """(V,) bool, on the CPU: the tokens that may come next.

        Tokens that end an answer are among them where the answer may end.
        """

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow what was accepted, but a token that ends the answer."""
