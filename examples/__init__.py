"""Runnable examples; each ends in a figure."""
