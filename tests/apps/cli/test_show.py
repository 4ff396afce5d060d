"""Pictures of policies, and the page of all of them, generated from what was measured."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from util import call

from fastdit import Config, Dense, Phase
from fastdit.apps.cli import show
from fastdit.apps.errors import UserError
from fastdit.core.layout import Layout
from fastdit.policies import POLICIES, Window
from fastdit.reporting.heatmap import MEASURES, colour, of_calls

DOCS = Path(__file__).parents[3] / "docs"


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


def test_schedule_says_where_no_phase_is(tmp_path, monkeypatch, capsys):
    holes = Config((Phase((0.9, 0.5), Window(density=0.5)), Phase((0.3, 0.0), Dense())))
    (tmp_path / "holes.json").write_text(json.dumps(holes.to_dict()))
    assert call(monkeypatch, "show", "schedule", tmp_path / "holes.json") == 0
    said = capsys.readouterr().out
    assert "no phase names noise levels from 1 to 0.9: attention is dense there" in said
    assert "no phase names noise levels from 0.5 to 0.3: attention is dense there" in said
    assert call(monkeypatch, "show", "schedule", "balanced") == 0
    assert "no phase names" not in capsys.readouterr().out


def test_a_heatmap_of_what_is_not_measured():
    ran = SimpleNamespace(step=0, density=0.5, error=None, seconds=0.1)
    for what in MEASURES:
        assert of_calls([(0, ran)], what, 1).width > 0
    with pytest.raises(ValueError, match="one of density, error, seconds, not 'foo'"):
        of_calls([(0, ran)], "foo", 1)
