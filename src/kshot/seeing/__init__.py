"""Seeing what one has, and sharing it: lists of runs, comparisons, pages of figures, model cards, the hub."""
