"""Measuring in several processes at once: what they exchange, and when."""
