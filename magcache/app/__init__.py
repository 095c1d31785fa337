"""The inside of the command line, magcache_generate.py, and of nothing else: `magcache` itself imports none of it.

They work with whichever `wan` package lies beside the script, this repository's or Wan2.1's own. It and torch are
imported in the functions that need them, so that flags, checks and plans are quick.
"""
