"""The parts of the command line, magcache_generate.py, and of nothing else: `magcache` itself imports none of them.

They work with whichever `wan` package lies beside the script, this repository's or Wan2.1's own. It and torch are
imported in the functions that need them, so that flags, checks and plans are quick.
"""
