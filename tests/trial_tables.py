"""Tables with trials whose results are given."""


def table_with(forecasts, others=(), steps=50, constants=None, name="mine", **measured_on):
    """Makes a table. forecasts: PSNRs of the prompts by computed calls; others: (method, settings, calls,
    PSNRs)."""
    constants = constants or {"floor": 0.008, "early": 0.5, "decay": 0.25}
    rows = [
        {"method": "forecast", "speedup": 2 * steps / calls, "calls": calls, "psnr": psnr} | constants
        for calls, psnr in forecasts.items()
    ]
    rows += [{"method": method, "calls": calls, "psnr": psnr} | settings for method, settings, calls, psnr in others]
    lists = {"mag_ratio": [0.99, 0.98] * (steps - 1), "calibrated_steps": steps, "measured_on": measured_on}
    return lists | {"name": name, "trials": {"constants": constants, "rows": rows}}


def fewer(calls, psnr):
    return "fewer steps", {"steps": calls // 2}, calls, psnr
