"""What several rooms must agree on."""

#: the label of a token that is no target
IGNORE_INDEX = -100
#: the two roles, always in this order: of gradients, weights, batches and columns
ROLES = ("forget", "retain")

#: a column of the forget set, made by the trainer: how many tokens a retain example begins with, too
SHARED_START = "shared_start"
#: a column of the forget set, made by the trainer: for each token 0, or 1 and its kind if it is to be forgotten
OWN_WORDS = "own_words"
#: of own words, by the token before them; each has a vector of its own
KINDS = 16
