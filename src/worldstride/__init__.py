"""Worldstride."""
