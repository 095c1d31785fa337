"""The denoise loop of the pipelines around a bare transformer, for tests that have no text encoder and no VAE."""

import diffusers
import torch


def wan_scheduler(shift: float):
    """UniPC for diffusers' pipelines at Wan's noise levels, which its own flow sigmas are not."""
    from wan.utils.samplers import sampling_sigmas

    class WanSteps(diffusers.UniPCMultistepScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(sigmas=sampling_sigmas("unipc", steps, shift).astype("float32"), device=device)

    return WanSteps(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


@torch.no_grad()
def denoise(model, latent, cond: dict, uncond: dict, steps: int, shift: float = 5.0, stop_after: int | None = None):
    """Guidance 5, UniPC; `stop_after` abandons the run after so many steps."""
    from wan.utils.samplers import make_sampler  # here, so that tests of magcache alone can be collected without it

    sampler = make_sampler("unipc", steps, shift)
    for t in sampler.timesteps[:stop_after]:
        velocity_cond, velocity_uncond = (model([latent], t=t[None], **arguments)[0] for arguments in (cond, uncond))
        velocity = velocity_uncond + 5.0 * (velocity_cond - velocity_uncond)
        latent = sampler.step(velocity[None], t, latent[None], return_dict=False)[0][0]
    return latent
