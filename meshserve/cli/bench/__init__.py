"""`meshserve bench`: load on any OpenAI-compatible server or on the mesh itself, and what it shows."""
