"""What is refused before anything is allocated, by flag, reason and remedy."""
