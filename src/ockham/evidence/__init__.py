"""Pure mathematics of model evidence: tensors in, tensors out, in nats; positive favours removal."""
