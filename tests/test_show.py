"""Pictures of policies, and the page of all of them, generated from what was measured."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from util import call

from fastdit.apps import show
from fastdit.apps.media import UserError
from fastdit.heatmap import colour
from fastdit.layout import Layout
from fastdit.policies import POLICIES, Window

DOCS = Path(__file__).parent.parent / "docs"


def test_command_draws_what_the_policy_keeps(tmp_path, monkeypatch, capsys):
    size = ["--set", "size=[1,3,3]", "--grid", "2x12x12", "--tile", "1x4x4"]
    assert call(monkeypatch, "show", "policy", "window", *size, "-o", tmp_path / "w.png") == 0
    kept = Window(size=(1, 3, 3)).select(Layout((2, 12, 12), (1, 4, 4)))[0, 0]
    assert f"{float(kept.float().mean()):.1%}" in capsys.readouterr().out
    image = np.asarray(Image.open(tmp_path / "w.png"))
    scale = image.shape[0] // kept.shape[0]
    yellow = (image[::scale, ::scale] == colour(1.0)).all(-1)
    assert np.array_equal(yellow[: kept.shape[0], : kept.shape[0]], kept.numpy())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["windows"], "unknown policy 'windows'"),
        (["window", "--grid", "9x16"], "--grid"),
        (["window", "--set", "density"], "key=value"),
        (["window", "--set", "density=7"], "density must lie in"),
        (["lsh", "--set", "tau=0.5"], "tau"),
        (["window", "-o", "/nowhere/at/all.png"], "choose another file"),
    ],
)
def test_what_is_wrong_is_named(arguments, named, monkeypatch, capsys):
    assert call(monkeypatch, "show", "policy", *arguments) != 0
    said = capsys.readouterr().err
    assert named in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_drawn(name):
    image, density = show.draw(show.make(name, []), Layout((3, 8, 8), (1, 4, 4)), 0.6)
    assert 0 < density <= 1
    assert image.width == image.height >= 12


def test_page_is_what_the_rows_say():
    """docs/policies.md holds the tables of the committed rows, and a picture of every policy."""
    page = (DOCS / "policies.md").read_text()
    results = DOCS / "results"
    costs = show.cost(results / "selection.json", results / "gpu_selection.json")
    for lines in (show.quality(results / "policies.json"), costs):
        assert "\n".join(lines) in page
    pictures = re.findall(r'src="(policies/\w+\.png)"', page)
    assert {Path(p).stem for p in pictures} == set(POLICIES)
    assert all((DOCS / p).is_file() for p in pictures)


def test_page_without_markers_is_named(tmp_path):
    (tmp_path / "policies.md").write_text("nothing")
    (tmp_path / "results").symlink_to(DOCS / "results")
    with pytest.raises(UserError, match="policies"):
        show.show_gallery(tmp_path)
