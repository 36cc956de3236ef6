"""Values that everybody shares: posterior, likelihood, batch, names, files. No algorithms."""
