"""The GPU benchmark: parameter lists, clocks, parity, peers, report. `make gpu` and `bench/bench_gpu.py` run it."""
