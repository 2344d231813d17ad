"""Prefill tasks and KV blocks from one peer to another: tickets, claims, attempts, blocks on the move."""
