"""Policies acting in environments: workers, episodes, evaluation, videos."""
