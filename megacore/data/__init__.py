"""Token data: files, sample order, documents, tokenizers. numpy only, never torch."""
