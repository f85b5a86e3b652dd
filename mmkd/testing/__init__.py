"""Generated data sets and small models, for the demo and the tests; nothing here downloads."""
