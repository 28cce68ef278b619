"""Newton-Schulz: its schedule, the reference, the products of Triton and of csrc, and the public function."""
