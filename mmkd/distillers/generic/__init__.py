"""Methods that work on any tapped layer."""
