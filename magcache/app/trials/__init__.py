"""Trials of a model: which a calibration makes (`ways`), how it makes them (`run`), what they say of another run
(`quality`). What they mean is in `magcache.trials`."""
