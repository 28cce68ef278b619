"""What an optimizer is, as values and plain torch: directions, estimators, rules, counted randomness, one rounding."""

from jaguar.method.method import Method as Method
