"""Measuring in many processes at once: what they tell each other, and when."""
