"""What an evaluation reads unless it is told otherwise; written beside every number that depends on it. No torch."""

# 64 rows of 512: enough rows for a standard error over rows to mean something.
TOKENS = 32768
SEQ_LEN = 512
SPLIT = "heldout"
PROTOCOL = (
    "documents in order, with the special tokens the tokenizer adds, cut into rows; every row begins with BOS if there "
    "is one; every position of a row but the first is predicted; natural logarithms; standard errors are over rows"
)
