"""Side-by-side measurements: what this project does against the plainest way to do the same. `python -m benchmarks`."""
