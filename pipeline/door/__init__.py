"""What people's checkpoints say, before anything expensive: honoured, known as harmless, or refused with a remedy."""
