"""Definition of an optimizer in values and plain torch: directions, estimators, rules, counted randomness, rounding."""

from jaguar.method.method import Method as Method
