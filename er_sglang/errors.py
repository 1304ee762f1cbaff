"""What a user can mend."""


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message says what to change."""
