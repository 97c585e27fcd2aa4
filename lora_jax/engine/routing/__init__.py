"""Calls in which every example meets an adapter of its own."""
