"""From evidence to keep: which weights go this round, and when the rounds end. Values in, values out; no nn."""
