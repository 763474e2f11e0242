"""The only place that knows diffusers: schedulers, pipelines, latent layouts, loading."""
