"""`fastdit.config.Reuse` under its former name."""

from fastdit.config import KINDS, STORES, Reuse  # noqa: F401
