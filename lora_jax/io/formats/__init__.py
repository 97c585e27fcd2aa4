"""Adapters that other tools wrote: recognised by bytes, keys and names, and read where the meaning is certain."""
