"""Long runs with everything that scripts do, at random from a seed."""
