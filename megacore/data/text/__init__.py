"""Text files to tokens: which files (sources), their bytes (blocks), the texts in them (documents), tokens (encode)."""
