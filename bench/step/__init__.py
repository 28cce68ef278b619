"""Steps of the optimizers: on the CPU, on the host alone, their kernels on a GPU, and in whole models.

From elsewhere: `gpu` (clock, memory, result file). `step.step.median_seconds` times scoring too.
"""
