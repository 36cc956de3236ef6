"""Where posteriors come from: variational optimizers, and the one value every other room reads."""
