"""Launchers: flags in, one call, results out."""
