"""Measurements, one command each. ``results/`` holds what they printed."""
