"""What the engine refuses, in the user's words."""


class RequestError(ValueError):
    """A request that can never be served as it is; `field` names the part of it that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
