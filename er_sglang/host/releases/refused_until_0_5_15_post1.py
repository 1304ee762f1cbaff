"""Settings of ServerArgs that came or went, to be refused beside those of host/refusals.py."""

GONE = ()
FIELDS = ()
