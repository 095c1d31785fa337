"""The inside of the command line, magcache_generate.py, and of nothing else: `magcache` itself imports none of it.

It works with whichever `wan` package lies beside the script, this repository's or Wan2.1's own. That and torch are
imported where something runs (`generate`, `results`, `progress`), so that flags, checks and plans are quick.
"""
