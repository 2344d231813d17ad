"""The frontend role: HTTP in, tokens streamed out."""
