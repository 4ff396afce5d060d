"""`fastdit.reporting.report` under its former name."""

from fastdit.reporting.report import *  # noqa: F403
