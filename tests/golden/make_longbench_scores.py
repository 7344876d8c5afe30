"""Creates longbench_scores.json with the packages that LongBench's own scorer uses.

pip install rouge==1.0.1 fuzzywuzzy==0.18.0
python tests/golden/make_longbench_scores.py
"""

import json
import pathlib
import warnings

warnings.filterwarnings("ignore")
from fuzzywuzzy import fuzz  # noqa: E402
from rouge import Rouge  # noqa: E402

PAIRS = [
  ("The cat sat on the mat. It slept.", "A cat slept on the mat. The dog did not."),
  ("one two three four five. six seven", "one three five seven. two four six"),
  ("nothing in common", "entirely different words here"),
  ("a a a b b. . c", "a b a b. c c"),
  (" . spaces  and dots ... everywhere .", "dots and spaces. everywhere"),
  ("same text", "same text"),
  ("The report says that rivers rose in spring and fell in autumn. Farmers were warned in time.",
   "Rivers rose in spring. In time the farmers were warned that rivers fell in autumn."),
]  # fmt: skip
LINES = [
  ("    return self.value + 1", "    return self.values + 2"),
  ("x = [i for i in range(10)]", "x = list(range(10))"),
  ("", "pass"),
  ("for i in range(3): total += i  ", "for j in range(4): total += j"),
]

scores = {
  "rouge_l": [[a, b, Rouge().get_scores([a], [b], avg=True)["rouge-l"]["f"]] for a, b in PAIRS],
  "code": [[a, b, fuzz.ratio(a, b) / 100] for a, b in LINES],
}
path = pathlib.Path(__file__).with_name("longbench_scores.json")
path.write_text(json.dumps(scores, indent=1) + "\n")
