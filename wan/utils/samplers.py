"""The two samplers of Wan2.1: diffusers' solvers, fed with Wan's noise levels."""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch.overrides import TorchFunctionMode

SAMPLERS = {"unipc": float(np.float32(0.999)), "dpm++": 1.0}  # their first noise level before the shift


def sampling_sigmas(sample_solver: str, steps: int, shift: float) -> np.ndarray:
    """Returns the noise levels of the steps, falling, float64 [steps], without the final 0: linear, then shifted by
    s x / (1 + (s - 1) x). UniPC starts at 0.999, DPM++ at pure noise. Raises KeyError for another solver."""
    linear = np.linspace(SAMPLERS[sample_solver], 0, steps + 1)[:-1]
    return shift * linear / (1 + (shift - 1) * linear)


class UniPC(UniPCMultistepScheduler):
    """UniPC without the check that its system of two equations has a solution, which waits for the GPU in every step.

    Under autocast its einsum is rounded to bfloat16 on CUDA, but not on the CPU. This is left as it is, since Wan2.1
    does the same, and results equal to its own on a GPU are worth more.
    """

    def step(self, *args, **kwargs):
        with Unchecked():
            return super().step(*args, **kwargs)


class Unchecked(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        return function(*args, **(kwargs or {}))


def make_sampler(
    sample_solver: str, steps: int, shift: float, device: torch.device | str = "cpu", num_train_timesteps: int = 1000
) -> SchedulerMixin:
    """Makes a second-order multistep solver of the flow ODE, ready for `steps` calls of `step` with latents on the
    device. Its timesteps are on the CPU, where reading them waits for nothing. sample_solver: "unipc" or "dpm++".
    Raises ValueError for another solver, or for less than one step."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if sample_solver not in SAMPLERS:
        raise ValueError(f"sample_solver must be one of {', '.join(SAMPLERS)}, got {sample_solver!r}")
    # without a flow_shift: the sigmas below are shifted already
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    solver = UniPC if sample_solver == "unipc" else DPMSolverMultistepScheduler
    sampler = solver(num_train_timesteps, **settings)
    sampler.set_timesteps(steps)
    sigmas = sampling_sigmas(sample_solver, steps, shift)
    # where the latents are, or every step would copy some of them there
    sampler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32)).to(device)
    sampler.timesteps = torch.from_numpy((sigmas * num_train_timesteps).astype(np.int64))
    if torch.device(device).type == "cuda":  # so that they are copied to the model without waiting
        sampler.timesteps = sampler.timesteps.pin_memory()
    sampler.set_begin_index(0)  # a look-up by timestep would find the second of two equal ones
    return sampler
