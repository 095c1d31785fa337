"""The two samplers of Wan2.1: diffusers' solvers, fed with Wan's noise levels."""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

SAMPLERS = ("unipc", "dpm++")


def sampling_sigmas(sample_solver: str, steps: int, shift: float) -> np.ndarray:
    """Noise levels of the steps, falling, float64 [steps], without the final 0: linear, then shifted by
    s x / (1 + (s - 1) x). UniPC starts at 0.999, DPM++ at pure noise. KeyError for another solver."""
    first = {"unipc": float(np.float32(0.999)), "dpm++": 1.0}[sample_solver]
    linear = np.linspace(first, 0, steps + 1)[:-1]
    return shift * linear / (1 + (shift - 1) * linear)


def make_sampler(
    sample_solver: str, steps: int, shift: float, device: torch.device | str = "cpu", num_train_timesteps: int = 1000
) -> SchedulerMixin:
    """A second-order multistep solver of the flow ODE, ready for `steps` calls of `step`. sample_solver: "unipc" or
    "dpm++". Raises ValueError for another, or for no steps."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if sample_solver not in SAMPLERS:
        raise ValueError(f"sample_solver must be one of {', '.join(SAMPLERS)}, got {sample_solver!r}")
    # without a flow_shift: the sigmas below are shifted already
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    solver = UniPCMultistepScheduler if sample_solver == "unipc" else DPMSolverMultistepScheduler
    sampler = solver(num_train_timesteps, **settings)
    sampler.set_timesteps(steps, device=device)
    sigmas = sampling_sigmas(sample_solver, steps, shift)
    sampler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    sampler.timesteps = torch.from_numpy((sigmas * num_train_timesteps).astype(np.int64)).to(device)
    sampler.set_begin_index(0)  # looked up by timestep it would start at the second of two equal ones
    return sampler
