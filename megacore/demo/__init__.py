"""The tour that `megacore demo` gives: text, tokenizer, dataset, training, and what came of it."""
