"""Tables, statistics and figures; no jax."""
