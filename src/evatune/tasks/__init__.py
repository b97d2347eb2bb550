"""The domains that evatune trains on: data, prompts and metrics, one folder each."""
