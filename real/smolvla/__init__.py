"""OTQL for SmolVLA's action expert, with a frozen vision-language model (paper §4.3, Tables 9, 10). No JAX."""
