"""Measuring: quality against the truth, speed, and replay of golden cases."""
