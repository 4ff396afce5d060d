"""`fastdit.core.layout` under its former name."""

from fastdit.core.layout import *  # noqa: F403
