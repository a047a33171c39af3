"""The chat: a question in, every attempt visible while it is made, a verdict back, and what was learned."""
