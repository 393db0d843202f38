"""Two small models of our own, trained on coloured shapes: a text-to-image pipeline and a vision-language model.

They show every job type where no model hub can be reached, and they are right about the little world they know.
"""
