"""Chat on one database: a question, its attempts as they happen, the user's verdict, and learning from it."""
