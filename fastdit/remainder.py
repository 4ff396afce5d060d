"""`fastdit.approx.remainder` under its former name."""

from fastdit.approx.remainder import *  # noqa: F403
