"""What is Wan2.2's, for the world models that are built on it."""
