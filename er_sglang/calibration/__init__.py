"""Measuring step times with the code and graphs that serve, and what such a measurement is valid for.

measure.py       the profile of a server: named, cached, or measured at its start
subject.py       what is measured
fingerprint.py   everything that the times depend on
"""
