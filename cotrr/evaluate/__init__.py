"""The evidence: metrics, intervals, acceptance, the report."""
