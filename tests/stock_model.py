"""The transformer of tests/stock_checkout, under another name than this repository's `wan`. Needs torch only."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parent / "stock_checkout" / "wan" / "modules" / "model.py"
_spec = importlib.util.spec_from_file_location("stock_wan_model", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

WanModel = _module.WanModel
