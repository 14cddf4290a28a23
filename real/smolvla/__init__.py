"""OTQL for SmolVLA's action expert, its vision-language model frozen (paper §4.3, Tables 9, 10). No JAX."""
