"""Laplace posteriors of trained networks, and reduction in one shot."""
