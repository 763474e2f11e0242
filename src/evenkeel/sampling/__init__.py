"""How a sampler turns model outputs into the next sample: step laws, noise levels, conversions."""
