"""A run that is told to end, as `timeout` does, ends its servers, too."""

import signal

# KeyboardInterrupt, for which pytest leaves its fixtures: it takes a SystemExit for one test's failure and goes on.
signal.signal(signal.SIGTERM, signal.default_int_handler)
