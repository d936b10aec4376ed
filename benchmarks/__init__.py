"""Marina measured beside its peers: `python -m benchmarks`, results in `results/`, tables in README.md."""
