"""Many runs that differ in method, rank, learning rate and seed: chosen on validation data, compared on test data."""
