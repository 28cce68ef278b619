"""The run of everything on a GPU (`make gpu`), and its result file and page, with the cases of Newton-Schulz.

Uses no other room: its stages are processes. `step` and `polar` measure by `clock` and `memory` and write by `result`;
`scoring` uses `tables`.
"""
