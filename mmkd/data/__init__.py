"""Generated data sets, and data of two domains."""
