"""Neural networks: plain torch modules that take explicit arguments and know nothing of processes or configuration."""
