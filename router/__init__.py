"""What clients meet: the OpenAI API, admission, the response cache, balancing, resume."""
