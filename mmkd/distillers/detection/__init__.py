"""Methods for object detectors."""
