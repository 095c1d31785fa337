import json
from dataclasses import dataclass


@dataclass
class PromptOutput:
    status: bool
    prompt: str
    seed: int
    system_prompt: str
    message: str


class QwenPromptExpander:
    def __init__(self, model_name=None, device=0, is_vl=False, **kwargs):
        self.model_name, self.is_vl = model_name, is_vl
        print(f"loading {model_name}")

    def __call__(self, prompt, system_prompt=None, tar_lang="zh", image=None, seed=-1, *args, **kwargs):
        assert (image is not None) == self.is_vl
        extended = f"{prompt} in {tar_lang}, at length"
        return PromptOutput(True, extended, seed, "", json.dumps({"content": extended}))


class DashScopePromptExpander:
    def __init__(self, api_key=None, model_name=None, max_image_size=512 * 512, retry_times=4, is_vl=False, **kwargs):
        raise ValueError("DASH_API_KEY is not set")
