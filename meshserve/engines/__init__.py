"""Engines turn tokens into KV blocks and KV blocks into tokens; the mesh does the rest."""
