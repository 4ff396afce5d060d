"""`fastdit.pipelines.embedded` under its former name."""

from fastdit.pipelines.embedded import *  # noqa: F403
