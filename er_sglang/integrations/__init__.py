"""What SELF_QUANT needs in a trainer's own process. None of it is imported by the server."""
