"""Measuring: engines side by side, their table, and the comparison of a result with the whole."""
