"""`fastdit.tune`: the search on errors and times that are known, and on the embedded pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdit
from fastdit import Config, Window
from fastdit.apps.compare.recorded import Call as Recorded
from fastdit.apps.tune import pipeline
from fastdit.apps.tune.search import DENSITIES, Trial, better, configuration, drift_of, search
from fastdit.attach.processor import installed
from fastdit.core.number_format import Quant
from fastdit.core.reference import relative_error
from fastdit.pipelines import embedded

CALL = {
    "prompt": "a red ball", "height": 96, "width": 96, "num_frames": 5, "num_inference_steps": 5, "guidance_scale": 1.0
}  # fmt: skip
FP8 = Quant("fp8", "fp8")


def known(config: Config) -> Trial:
    """An error that grows with the drift, and more so in few tiles; seconds that the dense steps take, and the tiles."""
    (phase,) = config.phases
    assert isinstance(phase.policy, Window)
    assert phase.policy.density is not None
    drift = drift_of(config)
    error = 0.2 * drift**0.8 * (0.125 / phase.policy.density) ** 0.2 * (0.75 if phase.remainder == "pooled" else 1)
    error += 0.0004 * (phase.quant == FP8)
    seconds = phase.policy.density * (0.6 if phase.quant == FP8 else 1) + 0.05 / drift + 0.1 * (phase.remainder == "pooled")
    return Trial(config, error, seconds)


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.1, 0.15])
@pytest.mark.parametrize("formats", [(), (FP8,)], ids=["16 bits", "FP8"])
def test_what_is_found_is_near_the_best_there_is(budget: float, formats: tuple[Quant, ...]) -> None:
    best, tried = None, []
    for trial in search(known, budget, formats, 10.0):
        tried.append(trial)
        best = better(best, trial, budget)
    assert best is not None
    assert best.error <= budget
    every = [
        known(configuration(density, drift / 1000))
        for density in (0.25, 0.125, 0.0625)
        for drift in range(1, 2000)
    ]  # fmt: skip
    grid = min(trial.seconds for trial in every if trial.error <= budget)
    assert best.seconds <= 1.08 * grid
    assert len(tried) <= 20
    assert len({json.dumps(trial.config.to_dict()) for trial in tried}) == len(tried)
    if formats and budget > 0.02:
        assert best.config.phases[0].quant == FP8


def test_a_candidate_that_is_slower_though_it_errs_more_is_given_up() -> None:
    tried = list(search(known, 1e-4, (), dense_seconds=0.2))
    assert all(trial.error > 1e-4 for trial in tried)
    assert [str(trial.config.phases[0].policy) for trial in tried] == [f"window({density}, clamp)" for density in DENSITIES]


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = embedded.load()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The recorded calls that were computed again. Their seconds are the query-key pairs that they computed, so that what is
    found does not depend on the machine."""
    calls: list[Recorded] = []
    real = pipeline.timed

    def timed(call: Recorded) -> tuple[torch.Tensor, float]:
        calls.append(call)
        velocity, _ = real(call)
        denoiser = installed(call.model)
        if denoiser is None:
            return velocity, 1.0
        last = [site.calls[-1] for site in denoiser.sites]
        return velocity, sum(1.0 if each.how in ("dense", "refresh") else each.density for each in last) / len(last)

    monkeypatch.setattr(pipeline, "timed", timed)
    return calls


def error_of(pipe: Any, config: Config | str | Path, seed: int) -> float:
    """The mean velocity error at the inputs of a dense run, by hooks."""
    calls: list[tuple[Any, Any, torch.Tensor]] = []
    with torch.no_grad():
        hook = pipe.transformer.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((args, dict(kwargs), out[0])), with_kwargs=True
        )
        pipe(**CALL, generator=torch.Generator().manual_seed(seed), output_type="latent")
        hook.remove()
        with fastdit.accelerate(pipe.transformer, config):
            errors = [relative_error(pipe.transformer(*args, **kwargs)[0], velocity) for args, kwargs, velocity in calls]
    return sum(errors) / len(errors)


def test_a_profile_keeps_to_the_budget_and_is_taken_by_name(pipe: Any, counted: list[Recorded], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    said: list[str] = []
    found = fastdit.tune(pipe, CALL, 0.1, out=path, show=said.append)
    assert installed(pipe.transformer) is None
    assert 0 < found.error <= 0.1
    assert found.error == pytest.approx(error_of(pipe, path, 0), rel=1e-5)
    assert found.held_out == pytest.approx(error_of(pipe, found.config, 1), rel=1e-5)
    assert found.held_out <= 0.11
    assert found.ratio > 1.5  # of pairs
    assert f"{found.ratio:.2f} × faster" in str(found)
    assert len(said) >= 2 + len(found.trials)
    assert found.config.min_tokens == 288  # it was measured at this length
    held = json.loads(path.read_text())
    assert Config.from_dict(held["config"]) == found.config
    assert (held["velocity_error"], held["held_out_velocity_error"]) == (found.error, found.held_out)
    with fastdit.accelerate(pipe, str(path)) as handle:
        assert handle.config == found.config
    counted.clear()
    again = fastdit.tune(pipe, CALL, 0.1, out=path)
    assert again.config == found.config
    tried = len(counted) / CALL["num_inference_steps"]
    assert tried <= 1 + 3 + 2 * pipeline.ROUNDS  # dense, the held-out run, the ratio: no trial again


def test_ctrl_c_keeps_the_best_so_far_and_the_next_call_goes_on(pipe: Any, counted: list[Recorded], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"

    def stop(line: str) -> None:
        if line.startswith("window") and len(json.loads(path.read_text())["trials"]) == 1:
            raise KeyboardInterrupt

    before = fastdit.accelerate(pipe, "fast").config
    with pytest.raises(KeyboardInterrupt):
        fastdit.tune(pipe, CALL, 0.3, out=path, show=stop)
    denoiser = installed(pipe.transformer)
    assert denoiser is not None
    assert denoiser.handle.config == before  # as it was
    fastdit.restore(pipe)
    held = json.loads(path.read_text())
    assert len(held["trials"]) == 1
    assert held["why"] == "not finished"
    found = fastdit.tune(pipe, CALL, 0.3, out=path)
    assert found.why == "the search was finished"
    assert found.trials[0].config == Config.from_dict(held["trials"][0]["config"])
    with pytest.raises(ValueError, match="another pipeline, call or machine"):
        fastdit.tune(pipe, CALL | {"num_frames": 9}, 0.3, out=path)


def test_no_configuration_is_forced_on_a_budget_that_none_keeps(pipe: Any, counted: list[Recorded]) -> None:
    found = fastdit.tune(pipe, CALL, 1e-5)
    assert found.config == Config()
    assert str(found).startswith("nothing faster than dense within velocity error 1e-05; the least error tried was 0.0")


def test_time_is_bounded(pipe: Any, counted: list[Recorded]) -> None:
    found = fastdit.tune(pipe, CALL, 0.1, minutes=1e-6)
    assert (len(found.trials), found.why) == (1, "stopped after 1e-06 minutes")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"minutes": 0}, "minutes"),
        ({"call": []}, "call must be"),
        ({"call": {"colour": 1}}, "takes no colour"),
        ({"pipe": torch.nn.Linear(1, 1)}, "this needs the pipeline"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_drawn(
    pipe: Any, counted: list[Recorded], arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        fastdit.tune(**{"pipe": pipe, "call": CALL} | arguments)
    assert counted == []


def test_a_file_of_something_else_is_not_replaced(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no profile"):
        fastdit.tune(pipe, CALL, out=path)
    assert path.read_text() == "{}"
    with pytest.raises(ValueError, match="is no configuration"):
        fastdit.accelerate(pipe, Path(__file__).with_name("none.json").parent / "test_tune.py")
    with pytest.raises(ValueError, match="cannot read"):
        fastdit.accelerate(pipe, "missing.json")
