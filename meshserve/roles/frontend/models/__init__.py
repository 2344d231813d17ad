"""Every field of every HTTP API, once: as structs, from which validation, `/openapi.json` and the page at `/docs` come."""
