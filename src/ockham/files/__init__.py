"""Files: atomic, pickle-free, versioned. Trees of tensors in safetensors, sparse tensors as bitmask and values."""
