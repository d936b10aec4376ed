"""What Marina promises while something goes wrong, measured: `python -m benchmarks.chaos`."""
