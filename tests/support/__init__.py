"""What many tests need: waiting for a condition, leak detection, real filesystems, real containers."""
