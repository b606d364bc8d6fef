"""Cursors: where a page of a list ended, as text that only this service reads."""

from __future__ import annotations

import base64
import binascii
import json
from datetime import UTC, datetime

from scangraph.contracts.errors import InvalidCursor


def encode(created_at: datetime, id: str) -> str:  # noqa: A002
    """Return the cursor behind the row made at `created_at` under `id`, the list's order."""
    text = json.dumps([created_at.astimezone(UTC).isoformat(), id], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(text: str) -> tuple[datetime, str]:
    """Return (created_at, id) of a cursor.

    Raises
    ------
    InvalidCursor
        If it is not one that `encode` made.
    """
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        at, row_id = json.loads(data)
        created_at = datetime.fromisoformat(at)
        if created_at.tzinfo is None or not isinstance(row_id, str) or "\0" in row_id:
            raise ValueError
        created_at = created_at.astimezone(UTC)
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error) as error:
        raise InvalidCursor from error
    return created_at, row_id
