"""Posteriors by training: variational optimizers in the shape of torch's, their priors, and predictions."""
