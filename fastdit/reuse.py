"""`fastdit.config.Reuse` under its former name."""

from fastdit.config import KINDS, Reuse  # noqa: F401
