"""What a run has learnt in files that other libraries read, one file of this package a format."""
