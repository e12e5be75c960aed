"""What a step reads, made ready: pictures, pairs, prompts, and the embeddings of texts."""
