"""JSON documents that are valid under a JSON Schema, written token by token, each a choice among those that keep them valid."""

from meshserve.engines.dummy.documents.document import WrittenDocument, read_schema

__all__ = ["WrittenDocument", "read_schema"]
