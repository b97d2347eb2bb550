"""Language understanding: an encoder or decoder with a new head tells what stands beside texts."""
