"""The dashboard: one page, its style and its scripts, as they are served."""
