"""What is printed: results as tables and as JSON, and what commands say on a terminal or into a pipe."""
