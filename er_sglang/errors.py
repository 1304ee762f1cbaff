"""What a user can mend."""


class ConfigError(ValueError):
    """What was asked for cannot be done; the message says what to change."""
