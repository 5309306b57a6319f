"""Task streams: data formats, tokenisation, batches."""
