"""Networks and data sets of the papers; import the modules by name, this package loads nothing heavy."""
