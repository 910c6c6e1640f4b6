"""Checks for strategies and cells, shipped for those from outside too."""
