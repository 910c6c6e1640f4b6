"""Orders in which a gradient is computed; they differ in time and memory."""
