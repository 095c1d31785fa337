"""Trials of a model: how a calibration makes them (`run`), what they say of another run (`quality`). What they mean is
in `magcache.trials`."""
