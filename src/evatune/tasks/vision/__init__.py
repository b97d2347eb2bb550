"""Image classification: pictures from folders, tables or a hub, VTAB-1K, any vision model with a new head."""
