"""From files to batches: records, tokenizers, plain chat text, length limits, batches, dataset builders."""
