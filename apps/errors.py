"""The error for a mistake that the user can correct; every command ends with its message in one line."""

from __future__ import annotations


class UserError(Exception):
    """What is wrong and how to correct it, in one line. code: exit status, 1 for a failure while running, 2 for wrong usage."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
