"""A network that is being quantized, and what it meets while sampling."""
