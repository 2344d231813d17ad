"""The processor role: text to tokens and back, and the owner of every request on its way through the mesh."""
