"""Plan: what a job takes in memory, denoiser calls and files, from configurations alone."""
