"""An HTTP server with OpenAI's interface on `dga_jax.generation.Engine`."""
