"""`fastdit.approx.step_cache` under its former name."""

from fastdit.approx.step_cache import *  # noqa: F403
