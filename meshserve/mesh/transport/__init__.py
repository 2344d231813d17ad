"""Sockets. The only room that imports zmq; everything above it deals in channels and messages."""
