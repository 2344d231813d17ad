"""Bytes to messages and back: pure, no sockets. The only floor that imports msgpack."""
