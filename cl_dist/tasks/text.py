"""What counts as the same text: one place decides it for labels, answers and predictions. Imports no torch."""

from __future__ import annotations

import unicodedata


def compose(text: str) -> str:
    """The text in Unicode's normal form C.

    An é is one character or two (an e and an accent), depending on who wrote the file; to a reader both are the same.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)
