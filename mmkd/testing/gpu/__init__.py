"""What tools/gpu.py runs: sections of cases, on a GPU or, as a dry run, on a CPU."""
