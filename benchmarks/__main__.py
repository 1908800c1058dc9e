"""`python -m benchmarks [TABLE ...]`: print tables, all by default."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from benchmarks import (
    attention,
    balance,
    cuts,
    decoding,
    dit,
    latents,
    linear,
    loading,
    order,
    packing,
    reading,
    saving,
    step,
    tracking,
)

TABLES = {
    "attention": attention.main,
    "balance": balance.main,
    "cuts": cuts.main,
    "decoding": decoding.main,
    "dit": dit.main,
    "latents": latents.main,
    "linear": linear.main,
    "loading": loading.main,
    "order": order.main,
    "packing": packing.main,
    "reading": reading.main,
    "saving": saving.main,
    "step": step.main,
    "tracking": tracking.main,
}


def main(names: list[str]) -> int:
    """Print the named tables; exit status."""
    if unknown := set(names) - set(TABLES):
        print(f"error: no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}", file=sys.stderr)
        return 2
    for name in names or TABLES:
        TABLES[name]()
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
