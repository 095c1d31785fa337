"""Noise levels and trajectories of both samplers against the reference implementation."""

import pytest
import torch
from golden_data import read_json, read_tensors

import magcache
from wan.utils.samplers import make_sampler

SCHEDULES = read_json("schedulers/schedules.json")
TRAJECTORIES = read_tensors("schedulers/trajectories.safetensors")


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda c: f"{c['solver']}-{c['steps']}-{c['shift']}")
def test_noise_levels(case):
    sampler = make_sampler(case["solver"], case["steps"], case["shift"])
    torch.testing.assert_close(sampler.sigmas.float(), torch.tensor(case["sigmas"]), rtol=0, atol=0)
    assert sampler.timesteps.tolist() == case["timesteps"]


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_the_timesteps_are_those_of_the_noise_levels(solver, shift):
    """To the last one: they decide which expert of two makes a step."""
    for steps in (1, 2, 9, 19, 20, 38, 40, 50, 57, 99, 100):
        levels = magcache.noise_levels(steps, shift, solver)
        assert make_sampler(solver, steps, shift).timesteps.tolist() == [int(1000 * sigma) for sigma in levels]


def follow(sampler, latent):
    """The ODE of the golden trajectories, whose velocity is a formula."""
    for t in sampler.timesteps:
        velocity = torch.tanh(0.5 * latent) * torch.cos(t / 1000 * 3) + 0.1 * latent
        latent = sampler.step(velocity[None], t, latent[None], return_dict=False)[0][0]
    return latent


@pytest.mark.parametrize("key", sorted(TRAJECTORIES))
def test_trajectories(key):
    solver, steps, shift = key.split(".", 2)
    sampler = make_sampler(solver, int(steps.removeprefix("steps")), float(shift.removeprefix("shift")))
    start = read_tensors("schedulers/start.safetensors")["latent"]
    torch.testing.assert_close(follow(sampler, start), TRAJECTORIES[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [12.0, 16.0])
def test_equal_first_timesteps(shift):
    """The reference dies at the end of such a run, since it looks its first step up by the timestep."""
    sampler = make_sampler("unipc", 100, shift)
    assert sampler.timesteps[0] == sampler.timesteps[1]
    start = read_tensors("schedulers/start.safetensors")["latent"]
    fine, coarse = follow(sampler, start), follow(make_sampler("unipc", 50, shift), start)
    torch.testing.assert_close(fine, coarse, rtol=0, atol=0.05)  # the same ODE, half the step


def test_unknown_solver():
    with pytest.raises(ValueError, match=r"unipc, dpm\+\+"):
        make_sampler("euler", 10, 5.0)
