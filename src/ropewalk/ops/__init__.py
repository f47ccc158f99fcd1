"""Arrays in, arrays out: the numerical kernels. Knows no module and no configuration."""
