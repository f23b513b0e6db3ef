"""What is asked of the host."""
