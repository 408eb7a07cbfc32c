"""megacore: trains language models on many devices, from raw text on."""

__version__ = "0.1.0"
