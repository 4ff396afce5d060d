"""`fastdit` for torchrun on a machine without GPUs: diffusers' `enable_parallelism` looks for one, and is told of the CPU."""

import torch

torch._C._get_accelerator = lambda: torch.device("cpu")
torch.accelerator.device_count = lambda: 2

from fastdit.apps.cli import main  # noqa: E402

main.main()
