"""Rules of the engine: one module for each kind of operation."""
