"""Looking and measuring: contact sheets, benchmarks, evaluations."""
