"""Measurements on real data, each with its command."""
