"""Implementations of `omnicompile::attention`, one a file, each with the operator's own arguments (see call.py)."""
