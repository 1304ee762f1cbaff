"""Quick start and benchmarks: small policies, a server to drive, load, and reports."""
