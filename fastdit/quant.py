"""`fastdit.core.quant` under its former name."""

from fastdit.core.quant import *  # noqa: F403
