"""The command line, sweeps, and the files that they write."""
