"""Language understanding: an encoder or decoder with a new head tells the class of a text or of two."""
