"""Ockham inside other people's training loops; every module imports its library, and nothing here is loaded without."""
