"""The GPU benchmark: parameter lists, clocks, parity, peers, report. `make gpu` and `python bench gpu` run it."""
