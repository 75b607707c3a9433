"""How long the cache's work takes: `python -m benchmarks --help`."""
