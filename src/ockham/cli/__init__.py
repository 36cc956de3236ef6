"""The command: one verb a file, one frozen dataclass of options a verb. Nobody imports it."""
