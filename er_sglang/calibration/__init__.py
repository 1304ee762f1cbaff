"""Measuring step times with the code and graphs that serve, and what such a measurement is valid for."""
