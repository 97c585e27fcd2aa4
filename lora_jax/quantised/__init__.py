"""Parameters in few bits: formats of codes, and the leaf that holds a parameter as codes and scales."""
