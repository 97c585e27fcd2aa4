"""What an adapter on disk holds, without the base it belongs to."""
