"""Marina's operations: pack, verify, store, serve, call and roll out model archives. Never imports torch by itself."""

__version__ = "0.1.0"
