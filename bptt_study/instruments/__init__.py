"""Instruments that read a gradient; they train nothing."""
