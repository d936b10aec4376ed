"""The front end and the worker protocol alone: a model that answers each request with its own body."""
