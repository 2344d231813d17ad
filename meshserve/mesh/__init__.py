"""Peers finding and calling each other: discovery, transport, membership, request streams, the ticket pipeline."""
