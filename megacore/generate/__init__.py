"""Text from a model that is in memory, whatever its layout."""
