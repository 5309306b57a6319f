"""The task stream: reading and checking data, tokenising it, planning batches and putting them together."""
