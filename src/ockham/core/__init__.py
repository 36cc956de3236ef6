"""Values that everybody shares: posterior, likelihood, batch, names, files, and the version. No algorithms."""

__version__ = "0.1.0"
