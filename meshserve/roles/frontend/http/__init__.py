"""HTTP/1.1 on `httptools`: connections with deadlines and size limits, requests, responses, a table of routes. Knows nothing of models."""
