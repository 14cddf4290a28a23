"""Algorithms, one file each; `base` has what they share, `presets` the published settings, `losses` shared losses."""

AGENTS = (
    *("bc", "cgql", "dsrl", "ewfm", "fawac", "fedit", "fql", "gfp", "ifql"),
    *("lps", "meanflowql", "optiflow", "otql", "qam", "qam_e", "qam_f", "qc", "qsm"),
)
