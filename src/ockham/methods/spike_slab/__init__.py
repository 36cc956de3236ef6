"""Spike-and-slab variational inference: formulas, optimizer, priors, inclusion probabilities and their audit."""
