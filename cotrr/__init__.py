"""Train, evaluate and ship a light reranker for image retrieval."""
