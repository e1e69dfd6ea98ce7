"""Studies: many runs from one file, by any number of processes on one folder."""
