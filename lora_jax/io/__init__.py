"""Adapters on disk."""
