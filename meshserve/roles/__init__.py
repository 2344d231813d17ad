"""The five roles: thin, each a room of its own; they join the floors below and never import each other."""
