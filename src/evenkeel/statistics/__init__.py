"""Evidence about quantization error: mergeable float64 moments per prompt, step and channel."""
