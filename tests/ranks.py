"""One of two gloo processes that share a denoiser's sequence: what `test_context_parallel.py` spawns.

    python ranks.py RANK FOLDER

Every case of `CASES` is run by stock diffusers (where its CPU backend can) and accelerated, and answers, reports and errors are
saved as FOLDER/RANK.pt for the test, which judges them against one process of its own. They meet by a file: no port to be taken
by somebody else.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from chequer import SPARSE
from diffusers import ContextParallelConfig
from families import BY_NAME, run

import fastdit

SPLITS = {
    "ulysses": {"ulysses_degree": 2},
    "ulysses anything": {"ulysses_degree": 2, "ulysses_anything": True},
    "ring": {"ring_degree": 2},
    "ring anything": {"ring_degree": 2, "ring_anything": True},
}
"""Names of `ContextParallelConfig`'s arguments."""
EVEN = {"encoder_hidden_states": 8}
"""Flux and Qwen-Image need texts of even length where sequences are cut into equal parts."""
CASES = [
    ("Wan", "ulysses"), ("Wan", "ring"), ("Flux", "ulysses"), ("Flux", "ulysses anything"), ("Flux", "ring"),
    ("Flux", "ring anything"), ("Flux2", "ulysses"), ("QwenImage", "ulysses anything"), ("QwenImage", "ring"),
]  # fmt: skip


def call(family: str, split: str) -> dict:
    """Arguments changed for a case: an even number of text tokens, unless any number will do."""
    case, changed = BY_NAME[family], {}
    given = case.call()
    if "anything" not in split and family.startswith(("Flux", "Qwen")):
        changed = {"encoder_hidden_states": given["encoder_hidden_states"].repeat(1, 2, 1)[:, :8]}
        if "txt_ids" in given:
            changed["txt_ids"] = torch.zeros(8, given["txt_ids"].shape[-1])
        if "encoder_hidden_states_mask" in given:
            changed["encoder_hidden_states_mask"] = None
    if family == "Flux2":
        changed |= {key: (changed.get(key, given[key]))[None].repeat(2, 1, 1) for key in ("img_ids", "txt_ids")}
    return changed


def split_model(family: str, split: str):
    model = BY_NAME[family].model()
    # diffusers looks for an accelerator, of which this machine has none: the mesh is what it would make
    config = ContextParallelConfig(**SPLITS[split])
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", (config.ring_degree, config.ulysses_degree), mesh_dim_names=("ring", "ulysses")
    )
    config.mesh = mesh
    model.enable_parallelism(config=config)
    return model


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch._C._get_accelerator = lambda: torch.device("cpu")
    torch.accelerator.device_count = lambda: 1
    found = {}
    with torch.no_grad():
        for family, split in CASES:
            case, changed = BY_NAME[family], call(family, split)
            result = found[family, split] = {}
            for kind, config in (("stock", None), ("exact", "exact"), ("sparse", SPARSE)):
                model = split_model(family, split)
                if config is not None:
                    fastdit.accelerate(model, config)
                try:
                    result[kind] = run(model, case, **changed)
                except (ValueError, RuntimeError) as error:
                    result[kind] = repr(error)
                if config is not None:
                    result[f"{kind} report"] = [(site.ran, site.reason, site.density) for site in fastdit.report(model).sites]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
