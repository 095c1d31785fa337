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
    """task: which only Wan2.2's asks for."""

    def __init__(self, model_name=None, task=None, device=0, is_vl=False, **kwargs):
        self.model_name, self.task, self.is_vl = model_name, task, is_vl
        print(f"loading {model_name}")

    def __call__(self, prompt, system_prompt=None, tar_lang="zh", image=None, seed=-1, *args, **kwargs):
        assert (image is not None) == self.is_vl
        of = "picture" if self.is_vl else "text"
        extended = f"{prompt} in {tar_lang}, at length, for {self.task}, of {of}"
        return PromptOutput(True, extended, seed, "", json.dumps({"content": extended}))


class DashScopePromptExpander:
    def __init__(self, api_key=None, **kwargs):
        raise ValueError("DASH_API_KEY is not set")
