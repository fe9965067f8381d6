"""What comes in: the contract, runs, splits, labels, datasets, the simulator.  NumPy; no JAX."""
