"""Generate with several arms and measure how near each comes."""
