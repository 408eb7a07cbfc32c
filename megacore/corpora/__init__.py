"""What the subcommands of `megacore data` do with corpora and data sets, and what they say of it."""
