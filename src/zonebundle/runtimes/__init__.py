"""What runs zones: one protocol, and a module for each runtime."""
