"""What several rooms must agree on."""

#: the label of a token that is no target
IGNORE_INDEX = -100
#: the two roles, always in this order: of gradients, weights, batches and columns
ROLES = ("forget", "retain")

#: a column of the forget set, made by the trainer: how many tokens a retain example begins with, too
SHARED_START = "shared_start"
#: a column of the forget set, made by the trainer: for each token 1 if it is to be forgotten
OWN_WORDS = "own_words"
