"""`python -m sora_lite.cli VERB`: the same as `sora-lite VERB`, for torchrun and srun."""

import sys

from sora_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
