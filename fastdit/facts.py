"""`fastdit.planning.adapter` under its former name."""

from fastdit.planning.adapter import *  # noqa: F403
