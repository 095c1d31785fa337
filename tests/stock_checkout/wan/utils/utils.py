import imageio
import numpy as np


def cache_video(tensor, save_file=None, fps=30, suffix=".mp4", nrow=8, normalize=True, value_range=(-1, 1), retry=5):
    try:
        pixels = (tensor[0].clamp(*value_range) + 1) / 2 * 255
        with imageio.get_writer(save_file, fps=fps, codec="libx264", quality=8) as writer:
            for frame in pixels.permute(1, 2, 3, 0).numpy().astype(np.uint8):
                writer.append_data(frame)
        return save_file
    except Exception as error:  # as upstream
        print(f"cache_video failed, error: {error}")
        return None


def cache_image(tensor, save_file, nrow=8, normalize=True, value_range=(-1, 1), retry=5):
    pixels = (tensor[0].clamp(*value_range) + 1) / 2 * 255
    imageio.imwrite(save_file, pixels.permute(1, 2, 0).numpy().astype(np.uint8))
    return save_file
