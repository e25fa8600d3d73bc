"""A trained model in use."""

THRESHOLD = 0.3  # the score from which on a detection is shown to people

# Two boxes on one thing are what people complain about most, and no two true boxes of 878 real pages have an IoU above
# .5. Without it a model has AP .208 on 165 of them, with it .305; with .6 or .8 the same to .003 (MEASURED.md).
DEDUPE = 0.7

# Two pixels a point: A4 has 1190x1684 pixels. That is above the 600 to 1025 of the pages in PubLayNet and DocLayNet, so
# that a page is shrunk to the model's short edge (640), as theirs mostly are. More dots change little but the time.
DPI = 144.0
