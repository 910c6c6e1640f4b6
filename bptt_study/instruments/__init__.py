"""Instruments that measure a gradient. They train nothing."""
