"""The model: features, losses, training, calibration.  Pure JAX."""
