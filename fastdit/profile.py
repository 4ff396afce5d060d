"""`fastdit.reporting.head_profile` under its former name."""

from fastdit.reporting.head_profile import *  # noqa: F403
