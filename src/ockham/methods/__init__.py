"""A room for every method; nothing below imports one."""
