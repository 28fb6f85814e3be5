"""Who may ask: everyone, or whoever sends the token. The token is compared in constant time and never logged."""

from __future__ import annotations

import base64
import hmac
import secrets

from starlette.datastructures import Headers

from tlcr.serving.limits import Refused

__all__ = ["OPEN_ROUTES", "Access"]

OPEN_ROUTES = ("/health",)
"""What is answered without the token, so that a load balancer can ask."""


class Access:
    """Checks the head ``Authorization`` of requests against one token, or lets everyone in where there is none."""

    def __init__(self, token: str | None) -> None:
        # Digests have one length, whatever was sent.
        self._key = secrets.token_bytes(32)
        self._digest = None if token is None else self._digest_of(token)

    def __repr__(self) -> str:
        return f"Access({'open' if self._digest is None else 'by token'})"

    def check(self, path: str, headers: Headers) -> None:
        """Refuses a request without the token: ``Bearer TOKEN``, or the password of ``Basic``.

        Trainers that take a URL and no header send what stands in ``http://any:TOKEN@host`` as ``Basic``.

        Args:
            path: the route's, of which ``OPEN_ROUTES`` want no token.
            headers: the request's.

        Raises:
            Refused: with 401, where the token is wanted and not there.
        """
        if self._digest is None or path in OPEN_ROUTES:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:  # no base64, or no UTF-8 in it
                given = ""
        elif scheme.lower() != "bearer":
            given = ""
        if not hmac.compare_digest(self._digest_of(given.strip()), self._digest):
            raise Refused(401, "this server wants its token: send the header 'Authorization: Bearer TOKEN'")

    def _digest_of(self, token: str) -> bytes:
        return hmac.digest(self._key, token.encode(errors="replace"), "sha256")
