"""For all tests."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # on a busy machine, and where an import comes first
settings.load_profile("no deadline")
