"""`python -m kvcache`: see `kvcache.command.cli`."""

import sys

from kvcache.command.cli import main

if __name__ == "__main__":
  sys.exit(main())
