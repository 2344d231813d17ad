"""HTTP/1.1 on `httptools`: connections with deadlines and size limits, requests, responses. Knows nothing of models."""
