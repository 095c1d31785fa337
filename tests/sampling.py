"""The denoise loop of the pipelines around a bare transformer, for tests that have no text encoder and no VAE."""

import torch


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
