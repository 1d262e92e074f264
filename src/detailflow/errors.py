"""The one exception for what a user can put right."""


class DetailFlowError(ValueError):
    """Bad input: a file, config, flag, checkpoint or image. The message, one sentence, names it and says what would be right."""
