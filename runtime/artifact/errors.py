"""The one error of this room."""


class ArtifactError(ValueError):
    """A model directory cannot be used; the message is one line naming the file, what is wrong and the way out."""
