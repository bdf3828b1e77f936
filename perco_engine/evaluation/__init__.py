"""Looking and measuring: contact sheets and benchmarks."""
