"""`python -m kvcache`: see `kvcache.cli`."""

import sys

from kvcache.cli import main

if __name__ == "__main__":
  sys.exit(main())
