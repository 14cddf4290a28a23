"""Policies in environments: workers, episodes, evaluation, videos."""
