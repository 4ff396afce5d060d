"""`fastdit.pipelines.registry` under its former name."""

from fastdit.pipelines.registry import *  # noqa: F403
