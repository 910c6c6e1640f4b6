"""Tables, statistics and figures, without jax."""
