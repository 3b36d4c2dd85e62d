"""Image curation (section 4): 16 candidates for a prompt, put into order by CLIP.

    python examples/curation.py

The paper picks the best of 16 by hand and says that CLIP can do so; `sample -n 16 --keep 1` does. A
row is all 16 from best to worst. CLIP is asked for the prompt with the coarse word in the learnt
word's place: it does not know the new one.
"""

from experiment import Lab, options
from gallery import galleries
from sheet import sheet

import textinv
from models.evaluation import rank

PROMPTS = ("a photo of a {} on the beach", "a sketch of a {}")


def main(argv=None) -> None:
    parser = options(__doc__, samples=16, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["mushroom", "hedgehog"])
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="with {} for the word")
    args = parser.parse_args(argv)
    lab, rows = Lab.of(args), {}
    for text, word, drawn in galleries(lab, args):
        order = rank(lab.scorer, drawn, textinv.plain_text(text, [word]))
        rows[text] = [drawn[i] for i in order]
    lab.save("curation.png", sheet(rows))


if __name__ == "__main__":
    main()
