"""What an optimizer is, as values and plain torch: directions, estimators, rules, counted randomness, one rounding."""
