"""A real model served by meshserve and by llama.cpp's own server, from the same library, in turn."""
