"""What a user asks for: `LoraConfig`, its checks, and which parameters it selects."""
