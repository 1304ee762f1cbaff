"""A run that is told to end, as `timeout` does, ends its servers, too."""

import signal

signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt: pytest leaves its fixtures
