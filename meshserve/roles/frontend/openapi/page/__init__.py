"""The page at `/docs`: its HTML, style and script, as they are served."""
