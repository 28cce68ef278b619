"""Parts of an optimizer, as values and plain torch: directions, estimators, rules, counted randomness, one rounding."""
