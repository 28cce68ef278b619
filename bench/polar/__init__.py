"""Newton-Schulz: accuracy, speed beside torch's, and orthogonalising less often.

From elsewhere: `gpu` (clock, memory, result file, cases of the page), `step` (a time limit for compilers), `learning`
(the byte-level model).
"""
