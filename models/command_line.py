"""The command line of textinv.py: arguments, progress, files, and what went wrong in one line.

Each verb is a function `run_VERB` of the parsed arguments. All that a script would want to import
is in textinv.py; here is what prints and writes.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import textinv
from textinv import (
    RATES,
    STOPS,
    STRENGTH,
    TEMPLATES,
    NotFinite,
    State,
    check_concepts,
    check_range,
    edit,
    evaluate,
    find_images,
    grid,
    guidance_of,
    hyperparameters,
    initial_vectors,
    is_one_word,
    open_image,
    open_mask,
    plain_text,
    prepare_images,
    sample,
    to_pil,
    train,
    unknown_words,
    warn_of_cuts,
)

from .checkpoint import BUNDLED, FAMILIES, holds_model, load_model
from .embeddings import (
    FORMATS,
    Concept,
    default_format,
    encode_concept,
    load_concept,
    load_concepts,
)
from .evaluation import Scorer, confidence, rank, read_captions, read_prompts, scores_of
from .files import Run, free_target, interruptible, write_png, write_table
from .latent_diffusion import LatentDiffusion
from .parallel import any_of_them, processes, rank_and_world, shared_out
from .reading import out_of_memory
from .stopping import Watch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse itself prints the usage, many lines, and exits
        raise ValueError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    """A verb's own options are in `add_VERB`; what several verbs have stands here. In brackets: the
    default."""
    parser = Parser(prog="textinv.py", description=textinv.__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    new = partial(argparse.ArgumentParser, add_help=False)

    loading = new()
    loading.add_argument("--model", metavar="PATH", help="checkpoint (the bundled model)")
    loading.add_argument("--family", choices=FAMILIES, help="if the file's keys do not tell")
    loading.add_argument("--prediction", choices=("eps", "v"), help="if the file does not tell")
    loading.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    loading.add_argument("--precision", choices=PRECISIONS, help="the device's best by default")
    seed = new()
    seed.add_argument("--seed", type=int, default=0, help="of all random numbers (0)")
    writing = new()
    writing.add_argument("--overwrite", action="store_true", help="replace files of this name")
    words = new()
    several = "a learnt word; once for each"
    words.add_argument("--concept", action="append", default=[], metavar="FILE", help=several)
    rename = "call a word otherwise; OLD is its file or its name"
    words.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help=rename)
    drawing = new(parents=[loading, seed, writing])
    drawing.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    drawing.add_argument(
        "--guidance", type=float, metavar="SCALE", help="1 is none (7.5; bundled 3)"
    )
    clip = new()
    clip.add_argument("--clip", metavar="PATH", help="OpenAI's ViT-B-32.pt (the bundled CLIP)")

    learning = [loading, seed, writing]
    add_invert(verbs.add_parser("invert", parents=learning, help="learn a word from pictures"))
    add_sample(verbs.add_parser("sample", parents=[drawing, words, clip], help="draw prompts"))
    add_edit(verbs.add_parser("edit", parents=[drawing, words], help="repaint part of a picture"))
    measure = "measure words (section 5.1)"
    add_evaluate(verbs.add_parser("evaluate", parents=[drawing, clip], help=measure))
    write = "write a word in another program's format"
    add_convert(verbs.add_parser("convert", parents=[writing], help=write))
    p = verbs.add_parser("show", parents=[loading, words], help="look into a file, or a prompt")
    p.add_argument("what", metavar="WORD-FILE|CHECKPOINT|PROMPT")
    p.set_defaults(run=run_show)
    return parser


def add_invert(p: argparse.ArgumentParser) -> None:
    p.add_argument("images", help="folder with 3-5 pictures of one thing")
    p.add_argument("--init-word", metavar="WORDS", help="coarse description to start from: cat")
    p.add_argument("--placeholder", metavar="WORD", help="what to call it (<NAME OF --out>)")
    p.add_argument("--out", metavar="FILE", help="NAME OF FOLDER.safetensors by default")
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument("--vectors", type=int, help="vectors per word (1; 3 if progressive)")
    p.add_argument("--steps", type=int, help="of training (5000; bundled model 600)")
    p.add_argument("--batch-size", type=int, help="pictures a step (4; bundled 8)")
    p.add_argument("--lr", type=rate, help="per picture of a step (0.005); or base, high, low")
    p.add_argument("--stop", choices=STOPS, default="never", help="auto: once the word is steady")
    p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's, towards 0 (0)")
    p.add_argument("--regularize", type=float, default=0.0, metavar="W", help="hold to init word")
    p.add_argument("--progressive", action="store_true", help="one vector, then two, then three")
    p.add_argument("--per-image", action="store_true", help="also a word for each picture alone")
    p.add_argument("--save-image-words", action="store_true", help="write those words as well")
    named = ", ".join(TEMPLATES)
    templates = f"{named}, captions (cat.txt beside cat.jpg), a file, or 'a photo of {{}}'"
    p.add_argument("--templates", default="object", metavar="T", help=templates)
    p.add_argument("--no-flip", action="store_true", help="do not mirror the pictures")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    p.add_argument("--preview-every", type=int, metavar="STEPS", help="0 for none (a third)")
    p.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="for --resume (50)")
    p.set_defaults(run=run_invert)


def add_sample(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="(word:1.2) weighs a word")
    p.add_argument("-n", type=int, default=4, help="pictures per prompt (default 4)")
    p.add_argument("--keep", type=int, metavar="K", help="the K of n that CLIP finds best")
    p.add_argument("--eta", type=float, default=0.0, help="0 is DDIM, 1 as noisy as DDPM (0)")
    p.add_argument("--size", metavar="W[xH]", help="pixels; the model's own size by default")
    p.add_argument("--out", default="grid.png", metavar="FILE", help="the grid (grid.png)")
    p.add_argument("--singles", metavar="FOLDER", help="also write each picture by itself")
    p.set_defaults(run=run_sample)


def add_edit(p: argparse.ArgumentParser) -> None:
    p.add_argument("image", metavar="IMAGE")
    p.add_argument("prompt", metavar="PROMPT", help="what is to be there")
    p.add_argument("--mask", metavar="FILE", help="white where the picture may change (all of it)")
    p.add_argument("--strength", type=float, help="1 keeps nothing (1 with a mask, else 0.6)")
    p.add_argument("-n", type=int, default=1, help="versions (default 1)")
    fit = "to fit the decoder to what the mask keeps (100); 0 for none: quicker, perhaps a seam"
    p.add_argument("--reconstruct-steps", type=int, default=100, metavar="STEPS", help=fit)
    p.add_argument("--out", default="edited.png", metavar="FILE", help="a grid if n > 1")
    p.set_defaults(run=run_edit)


def add_evaluate(p: argparse.ArgumentParser) -> None:
    p.add_argument("concepts", nargs="*", metavar="CONCEPT", help="files; a folder is a setup")
    p.add_argument("--images", required=True, metavar="DIR", help="what they were learnt from")
    p.add_argument("--references", action="store_true", help="image only, prompt only")
    p.add_argument("--captions", metavar="FILE", help="human captions; of FOLDER, its NAME.txt")
    p.add_argument("--prompts", metavar="FILE", help="'kind: prompt with {}' lines (the paper's)")
    p.add_argument("-n", type=int, default=64, help="samples per prompt (default 64)")
    p.add_argument("--out", default="scores.csv", metavar="FILE", help="the table (scores.csv)")
    p.add_argument("--chart", metavar="FILE", help="figure 7 of it (needs matplotlib)")
    p.set_defaults(run=run_evaluate)


def add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="IN")
    p.add_argument("out", metavar="OUT")
    p.add_argument("--format", choices=FORMATS, help="by OUT's ending if not given")
    p.add_argument("--placeholder", metavar="WORD", help="its name in OUT")
    p.add_argument("--word", metavar="WORD", help="which one, if IN holds several")
    p.add_argument("--picture", metavar="FILE", help="what an OUT.png shows")
    p.set_defaults(run=run_convert)


def rate(text: str) -> float | str:
    """A learning rate as a number, or the name of one."""
    try:
        return text if text in RATES else float(text)
    except ValueError:
        message = f"{text!r} is no learning rate; use a number, {', '.join(RATES)}"
        raise argparse.ArgumentTypeError(message) from None


def load_for(args: argparse.Namespace) -> LatentDiffusion:
    model = load_model(
        args.model, args.device, PRECISIONS.get(args.precision), args.family, args.prediction
    )
    print(model)
    return model


def near_words(paths: Sequence[Path], count: int = 5) -> str:
    """The trained words of the bundled model that look most like the pictures."""
    words = json.loads((BUNDLED / "config.json").read_text())["nouns"]
    pictures = [open_image(path) for path in paths]
    scorer = Scorer.load()
    texts = scorer.texts([f"a photo of a {word}" for word in words])
    cosines = (scorer.images(pictures) @ texts.T).mean(0)
    return ", ".join(words[i] for i in cosines.topk(count).indices)


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    status = Path("/proc/self/status")
    # Trap: on Linux ru_maxrss counts the peak of the process that started this one as well.
    if status.exists() and (own := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return f"{int(own[1]) / 2**20:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return "?"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def read_templates(choice: str, pictures: Sequence[Path]) -> list[str] | list[list[str]]:
    """The prompts that --templates stands for."""
    if choice in TEMPLATES:
        return list(TEMPLATES[choice])
    if "{}" in choice:
        return [choice]
    if choice == "captions":
        captions = [path.with_suffix(".txt") for path in pictures]
        if missing := next((path for path in captions if not path.is_file()), None):
            raise ValueError(
                f"{missing} is missing; --templates captions wants a text file beside each picture "
                "with a line such as 'a photo of {} on the grass'"
            )
        return [read_lines(path) for path in captions]
    if not Path(choice).is_file():
        raise ValueError(
            f"--templates {choice} is no file; use {', '.join(TEMPLATES)}, captions, a file with "
            "one template a line, or a template such as 'a photo of {}'"
        )
    return read_lines(Path(choice))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of templates; every one needs a {} for the word."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not readable as text with one template a line ({error})"
        ) from None
    for line in lines:
        if "{}" not in line:
            raise ValueError(f"{path}: {line[:60]!r} has no {{}} where the word goes")
    if not lines:
        raise ValueError(f"{path}: empty; write a template such as 'a photo of {{}}' into it")
    return lines


def starter() -> list[str]:
    """What this program was started with, for a command that is to be given again."""
    world = os.environ.get("WORLD_SIZE")
    return ["torchrun", "--nproc-per-node", world] if world else ["python"]


@contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def default_placeholder(name: str) -> str:
    """ "my cat" is <my-cat>."""
    return f"<{'-'.join(name.split())}>"


def target_of(args: argparse.Namespace) -> tuple[Path, str]:
    """Where `invert` writes to, and what it calls the word; both follow from the pictures' folder
    unless they are given."""
    source = Path(args.images).resolve()
    name = Path(args.out).stem if args.out else source.stem if source.is_file() else source.name
    out = Path(args.out or f"{name}.safetensors")
    default_format(out.suffix)  # raises where it is none
    if source.is_dir() and out.resolve().parent == source:
        raise ValueError(
            f"{out} lies among the pictures to learn from, and so would the previews; write it "
            f"elsewhere, for example --out {os.path.relpath(source.parent / out.name)}"
        )
    return out, default_placeholder(name) if args.placeholder is None else args.placeholder


def training_options(args: argparse.Namespace, model: LatentDiffusion, paths: list[Path]) -> dict:
    """The options of `train` that decide what is learnt."""
    steps, batch_size, lr = hyperparameters(model, args.steps, args.batch_size, args.lr)
    vectors = (3 if args.progressive else 1) if args.vectors is None else args.vectors
    options = dict(init_word=args.init_word, vectors=vectors, flip=not args.no_flip)
    options |= dict(steps=steps, batch_size=batch_size, lr=lr, seed=args.seed, stop=args.stop)
    options |= dict(templates=read_templates(args.templates, paths), per_image=args.per_image)
    options |= dict(weight_decay=args.weight_decay, regularize=args.regularize)
    return options | dict(progressive=args.progressive)


def run_invert(args: argparse.Namespace) -> int:
    out, placeholder = target_of(args)
    check_range(1, save_every=args.save_every)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on and --overwrite begins anew; give one of them")
    if args.save_image_words and not args.per_image:
        raise ValueError("--save-image-words saves the words of --per-image; add that, or drop it")
    paths = find_images(args.images)
    check_init_word(args.init_word, paths)
    model = load_for(args)
    ids = model.tokenizer.token_ids(args.init_word)
    print(f"init word {args.init_word!r}: {len(ids)} token(s), ids {ids}")
    if len(ids) > len(args.init_word.split()):
        warnings.warn(f"this model spells {args.init_word!r} in pieces; a word it knows is better")
    pixels = prepare_images(paths, model.size)
    options = training_options(args, model, paths) | dict(placeholder=placeholder)
    run = Run(out, options | circumstances(model, pixels, options))
    state, steps = run.look(args.resume, args.overwrite), options["steps"]
    begun = int(state["step"]) if state else 0
    if args.resume and not state:
        warnings.warn(f"there is no run at {out} to go on with; it begins anew")
    if state and out.exists() and (begun == steps or Watch.of(state).steady()):
        print(f"the run is over after {begun} steps; the word is in {out}")
        return 0
    pictures = to_pil(pixels)
    options |= dict(gradient_checkpointing=args.gradient_checkpointing, resume=state)
    states = train(model, pictures, **options)
    start = initial_vectors(model, args.init_word, options["vectors"])
    encode_concept(Concept(placeholder, start), default_format(out.suffix), out.suffix)
    run.begin(anew=state is None)
    write_png(run.path("inputs.png"), grid(pictures), {"what": "what the model sees"}, True)
    where = f", from step {begun} on" if begun else ""
    shown = f"{len(pictures)} picture" + "s" * (len(pictures) > 1)
    print(f"learning {placeholder} from {shown}, {steps} steps{where}, to {out}")
    progress = tqdm(states, total=steps, initial=begun, unit="step")
    over = learn(model, progress, run, start, args)
    if rank_and_world()[0] == 0:
        print(what_next(args, out, over))
    return 0 if over else 130


def check_init_word(init_word: str | None, paths: Sequence[Path]) -> None:
    if not init_word:
        raise ValueError(
            "--init-word is missing: the coarse word for what the pictures show (cat, mug, "
            "painting), from which the new word starts; of the bundled model's words these look "
            f"most like them, right or wrong: {near_words(paths)}"
        )


def circumstances(model: LatentDiffusion, pixels: Tensor, options: dict) -> dict:
    """What a run must have in common with the one that it goes on with, beside its options."""
    found = dict(model=model.name, fingerprint=model.fingerprint, precision=str(model.dtype))
    found |= dict(prediction=model.schedule.prediction)
    found |= dict(pictures=hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16])
    # The vectors of a progressive word join by the number of steps; other runs may be given more.
    return found | dict(progressive=options["steps"] if options["progressive"] else None)


def what_next(args: argparse.Namespace, out: Path, over: bool) -> str:
    """What was written, and the command to try it with; or the one to go on with."""
    if not over:
        command = shlex.join([*starter(), *sys.argv, *["--resume"] * (not args.resume)])
        return f"stopped; the word so far is in {out}; go on with: {command}"
    word = load_concept(out).placeholder  # .pt and .png have names of their own
    again = ["sample", f"a photo of {word}", "--concept", str(out)]
    again += ["--model", args.model] if args.model else []
    return f"wrote {out}; try: python textinv.py {shlex.join(again)}"


def learn(model, progress: tqdm, run: Run, start: Tensor, args) -> bool:
    """Train, and keep the run's files up to date; False if it was asked to stop before the end."""
    steps, every, state = progress.total, args.preview_every, None
    every = max(1, steps // 3) if every is None else every
    try:
        with interruptible() as asked:
            for state in progress:
                run.rows.append(row(state, start))
                progress.set_postfix(loss=mean_loss(run), peak=peak_memory(model.device))
                over = state.over(steps)
                shown = every and state.step % every == 0 and not over
                if shown or state.step % args.save_every == 0:
                    save_run(run, state, args.save_image_words)
                if shown:  # after saving: on a small GPU it may run out of memory
                    preview(model, run, state)
                if any_of_them(bool(asked)):
                    break
    except NotFinite:
        if state is not None:
            save_run(run, state, args.save_image_words)
        raise
    finally:
        progress.close()
    save_run(run, state, args.save_image_words)
    if over and state.step < steps:
        print(f"steady after {state.step} of {steps} steps")
    return over


def row(state: State, start: Tensor) -> dict[str, str]:
    """A line of the table: how long the vectors are and how far from where they started. One wait
    for the device, for all of it."""
    vectors = state.concept.vectors.detach()
    moved = vectors - start[: len(vectors)]
    figures = [state.loss, vectors.norm(dim=1).mean(), moved.norm(dim=1).mean()]
    loss, norm, moved = torch.stack(figures).tolist()
    watched = state.watch and state.step % Watch.EVERY == 0
    fixed = f"{state.watch.losses[-1]:.6f}" if watched else ""
    figures = dict(step=str(state.step), loss=f"{loss:.6f}", fixed_loss=fixed)
    return figures | dict(norm=f"{norm:.4f}", moved=f"{moved:.4f}")


def mean_loss(run: Run) -> str:
    """Of the last steps; a single step's depends on its timesteps more than on the word."""
    return f"{np.mean([float(row['loss']) for row in run.rows[-50:]]):.4f}"


def preview(model: LatentDiffusion, run: Run, state: State) -> None:
    prompt = f"a photo of {state.concept.placeholder}"
    shown = sample(model, prompt, [state.concept], n=4, steps=20)
    write_png(run.path(f"step-{state.step}.png"), grid(shown), {"prompt": prompt}, True)


def save_run(run: Run, state: State, image_words: bool) -> None:
    state.concept.save(run.out, overwrite=True)
    for i, word in enumerate(state.image_words if image_words else (), 1):
        word.save(run.path(f"image-{i}{run.out.suffix}"), overwrite=True)
    run.save(state.tensors())


def load_words(files: Sequence[str], renames: Sequence[str]) -> list[Concept]:
    """The words of the files, under the names that --rename OLD=NEW gives them."""
    new_names = dict(entry.rpartition("=")[::2] for entry in renames)
    concepts, known = [], set()
    for path in files:
        for concept in load_concepts(path):
            olds = (path, Path(path).name, concept.placeholder)
            old = next((old for old in olds if old in new_names), concept.placeholder)
            concepts.append(replace(concept, placeholder=new_names.get(old, old)))
            known |= set(olds)
    for old, new in new_names.items():
        if old not in known or not new:
            raise ValueError(
                f"--rename {old}={new}: no word or file of that name is loaded, or no new name "
                f"is given; there are {', '.join(sorted(known)) or 'none (use --concept FILE)'}"
            )
    return concepts


def free_png(path: str, overwrite: bool) -> Path:
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} is no .png; pictures are written as PNG, with their settings")
    return free_target(Path(path), overwrite)


def read_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError(f"--size {text} is not a size; use 512 or 512x768")
    width, height = (text.split("x") * 2)[:2]
    return int(width), int(height)


def words_for(args: argparse.Namespace, prompts: Sequence[str]) -> list[Concept]:
    """The learnt words for some prompts, which are checked before anything takes its time. Warns of
    what looks like such a word and is none."""
    concepts = load_words(args.concept, args.rename)
    for prompt in prompts:
        plain_text(prompt, concepts)
    for concept in concepts:
        if not any(concept.placeholder in prompt for prompt in prompts):
            warnings.warn(f"{concept.placeholder} was loaded, but stands in no prompt")
    for word in unknown_words(prompts, concepts):
        known = ", ".join(c.placeholder for c in concepts) or "none"
        warnings.warn(f"{word} is no learnt word (known: {known}); it is read as plain text")
    return concepts


def run_sample(args: argparse.Namespace) -> None:
    out = free_png(args.out, args.overwrite)
    check_range(1, n=args.n)
    keep = args.n if args.keep is None else args.keep
    if not 1 <= keep <= args.n:
        raise ValueError(f"--keep {keep} of -n {args.n} pictures; keep 1 to {args.n}")
    if args.clip and args.keep is None:
        raise ValueError("--clip says which CLIP chooses the pictures of --keep; add that")
    singles = [Path(args.singles or "") / f"{i:04d}.png" for i in range(keep * len(args.prompts))]
    for path in singles if args.singles else ():
        free_target(path, args.overwrite)
    concepts, size = words_for(args, args.prompts), read_size(args.size)
    model = load_for(args)
    scorer = Scorer.load(args.clip, model.device) if args.keep else None
    settings = dict(steps=args.steps, eta=args.eta, seed=args.seed, size=size or model.size)
    settings |= dict(guidance_scale=guidance_of(model, args.guidance))
    print(f"drawing {len(args.prompts)} prompt(s) x {args.n}, {args.steps} DDIM steps, to {out}")
    rows, seeds = [], []
    draw = partial(sample, model, concepts=concepts, n=args.n, **settings)
    drawn = zip(args.prompts, shared_out(args.prompts, draw))
    one = len(args.prompts) == 1
    for prompt, images in tqdm(drawn, total=len(args.prompts), unit="prompt", disable=one):
        order = rank(scorer, images, plain_text(prompt, concepts)) if scorer else range(args.n)
        for i in list(order)[:keep]:
            if args.singles:
                text = {"prompt": prompt, "settings": settings | dict(seed=args.seed + i)}
                write_png(singles[len(rows)], images[i], text, args.overwrite)
            rows.append(images[i])
            seeds.append(args.seed + i)
    columns = keep if len(args.prompts) > 1 else None
    settings |= dict(n=args.n, seeds=seeds, model=model.name)
    text = {"prompt": "\n".join(args.prompts), "settings": settings}
    write_png(out, grid(rows, columns), text, args.overwrite)
    print(f"wrote {out}")


def run_edit(args: argparse.Namespace) -> None:
    out = free_png(args.out, args.overwrite)
    check_range(1, n=args.n)
    image = open_image(args.image)
    mask = open_mask(args.mask, image.size) if args.mask else None
    concepts, model = words_for(args, [args.prompt]), load_for(args)
    strength = STRENGTH[mask is not None] if args.strength is None else args.strength
    settings = dict(strength=strength, steps=args.steps)
    settings |= dict(reconstruct_steps=args.reconstruct_steps)
    settings |= dict(guidance_scale=guidance_of(model, args.guidance))
    print(f"repainting {args.image}, {args.n} version(s), {args.steps} DDIM steps, to {out}")
    images, seeds = [], range(args.seed, args.seed + args.n)
    for seed in tqdm(seeds, unit="version", disable=args.n == 1):
        images += edit(model, image, args.prompt, concepts, mask, seed=seed, **settings)
    settings |= dict(image=args.image, mask=args.mask, seeds=[*seeds], model=model.name)
    text = {"prompt": args.prompt, "settings": settings}
    write_png(out, grid(images), text, args.overwrite)
    print(f"wrote {out}")


def pictures_of(folder: str, concept: str) -> Path:
    """The folder's own pictures, or those in its subfolder that is called like the word's file."""
    own = Path(folder) / Path(concept).stem
    return own if own.is_dir() else Path(folder)


def subjects(args: argparse.Namespace) -> Iterator[tuple[str, str, Path, list[str] | None, list]]:
    """What `evaluate` measures: (setup, name, pictures, texts, concepts). Words that lie in one
    folder are one setup; the references of section 5.2 are setups of their own."""
    sets = {}
    for path in args.concepts:
        name, folder = Path(path).stem, pictures_of(args.images, path)
        word = replace(load_concept(path), placeholder=default_placeholder(name))
        yield Path(path).resolve().parent.name, name, folder, [word.placeholder], [word]
        sets[name] = folder
    for name, folder in (sets or {Path(args.images).name: Path(args.images)}).items():
        if args.references:
            yield "image only", name, folder, None, []
            yield "prompt only", name, folder, [""], []
        if args.captions:
            file = Path(args.captions)
            file = file / f"{name}.txt" if file.is_dir() else file
            for label, captions in read_captions(file).items():
                yield label, name, folder, captions, []


def run_evaluate(args: argparse.Namespace) -> None:
    out = free_target(Path(args.out), args.overwrite)
    measured = list(subjects(args))
    if not measured:
        raise ValueError("nothing to measure; give words, --references or --captions FILE")
    names = [subject[:2] for subject in measured]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two words are {twice[1]} of the setup (folder) {twice[0]}; rename one")
    chart = free_png(args.chart, args.overwrite) if args.chart else None
    prompts = read_prompts(args.prompts)
    for prompt in (prompt for listed in prompts.values() for prompt in listed):
        plain_text(prompt, [])  # a faulty weight is said before hours of work
    for _, _, folder, _, _ in measured:
        find_images(folder)
    model = load_for(args)
    for *_, concepts in measured:
        check_concepts(model, concepts)
    scorer = Scorer.load(args.clip, model.device)
    count = 1 + sum(map(len, prompts.values()))
    print(f"measuring {len(measured)} subject(s), {count} prompts x {args.n} samples, to {out}")
    options = dict(prompts=prompts, n=args.n, steps=args.steps, guidance_scale=args.guidance)
    rows = []
    with tqdm(total=len(measured) * count, unit="prompt") as progress:
        for setup, name, folder, texts, concepts in measured:
            progress.set_postfix_str(f"{setup}, {name}")
            for row in evaluate(model, scorer, folder, texts, concepts, seed=args.seed, **options):
                rows.append(dict(setup=setup, name=name, **row))
                progress.update()
            write_table(out, rows, overwrite=args.overwrite or len(rows) > count)
    print_scores(rows)
    print(f"wrote {out}")
    if chart and rank_and_world()[0] == 0:
        draw_chart(out, chart)


def print_scores(rows: Sequence[dict]) -> None:
    print(f"{'setup':20} {'word':20} reconstruction  editability")
    for setup, scores in scores_of(rows).items():
        for name, first, second in scores:
            print(f"{setup:20.20} {name:20.20} {first:14.4f} {second:12.4f}")
        if len(scores) > 1:
            (a, da), (b, db) = (confidence([s[i] for s in scores]) for i in (1, 2))
            print(
                f"{setup:20.20} {'mean, 95% interval':20} {a:6.4f} +-{da:.4f} {b:7.4f} +-{db:.4f}"
            )


def draw_chart(table: Path, chart: Path) -> None:
    """Figure 7 of a table of scores, by the script for it in a process of its own: matplotlib is an
    extra, so a missing one costs the chart and nothing else."""
    script = Path(__file__).resolve().parent.parent / "examples" / "chart.py"
    command = [sys.executable, script, table, chart]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        warnings.warn(f"no chart: {reason}; pip install matplotlib, and run from the repository")
    else:
        print(f"wrote {chart}")


def run_convert(args: argparse.Namespace) -> None:
    out = free_target(Path(args.out), args.overwrite)
    concepts = load_concepts(args.source)
    names = ", ".join(concept.placeholder for concept in concepts)
    chosen = [c for c in concepts if args.word in (None, c.placeholder)]
    if len(chosen) != 1:
        wrong = f", not {args.word}" if args.word else ""
        raise ValueError(f"{args.source} holds {names}{wrong}; say which one with --word")
    placeholder = chosen[0].placeholder if args.placeholder is None else args.placeholder
    if not is_one_word(placeholder):
        raise ValueError(
            f"--placeholder {placeholder!r} is empty or has a space; use one like <cat>"
        )
    concept = replace(chosen[0], placeholder=placeholder)
    format = args.format or default_format(out.suffix)
    if args.picture and out.suffix.lower() != ".png":
        raise ValueError(f"--picture is what a .png shows; {out} is none")
    picture = open_image(args.picture) if args.picture else None
    concept.save(out, args.overwrite, format, picture)
    word = load_concept(out).placeholder
    print(f"wrote {out} ({format}): {word}, {tuple(concept.vectors.shape)}")
    if args.placeholder not in (None, word):
        warnings.warn(f"in this format the word is called {word}, whatever --placeholder says")


def run_show(args: argparse.Namespace) -> None:
    path = Path(args.what)
    if args.what and os.path.isdir(path) or os.path.isfile(path) and holds_model(path):
        args.model = args.what
        show_model(load_for(args))
    elif os.path.isfile(path):
        show_words(load_words([args.what, *args.concept], args.rename), args)
    elif path.suffix in (".safetensors", ".ckpt", ".pt", ".bin", ".png"):
        raise ValueError(f"{path}: no such file")
    else:
        model = load_for(args)
        concepts = load_words(args.concept, args.rename)
        check_concepts(model, concepts)
        tokenizer, words = model.tokenizer, model.weighted_ids(args.what, concepts)
        warn_of_cuts(model, {args.what: len(words)})
        ids = tokenizer.frame([i for i, _ in words])
        for i, weight in zip(ids, [1.0, *(w for _, w in words)][: len(ids) - 1] + [1.0]):
            print(f"{i:6d} {token(model, concepts, i)}" + f" x {weight:.2f}" * (weight != 1))


def token(model: LatentDiffusion, concepts: Sequence[Concept], i: int) -> str:
    """How an id is written: the vocabulary's entry, or a learnt word and the vector's number."""
    for name, ids in model.placeholders(concepts).items():
        if i in ids:
            return f"{name}, vector {i - ids[0] + 1} of {len(ids)}"
    return next(text for text, number in model.tokenizer.ids.items() if number == i)


def show_model(model: LatentDiffusion) -> None:
    print(f"stored as {model.stored}")
    for name in ("unet", "autoencoder", "text_encoder"):
        count = sum(p.numel() for p in getattr(model, name).parameters())
        print(f"{name:12} {count / 1e6:8,.1f}M parameters")
    width, length = model.text_encoder.token_table.shape[1], model.tokenizer.max_length
    print(f"words of {width} numbers, prompts of {length} tokens, pictures of {model.size} pixels")


def show_words(concepts: Sequence[Concept], args: argparse.Namespace) -> None:
    """Sizes, norms beside those of the model's own words, and the words nearest by cosine."""
    model = load_for(args)
    table = model.text_encoder.token_table.float().cpu()
    norms = table.norm(dim=1)
    low, middle, high = norms.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    for concept in concepts:
        count, width = concept.vectors.shape
        print(f"{concept.placeholder}: {count} vector(s) of {width} numbers")
        for key, value in concept.metadata.items():
            print(f"  {key}: {value if len(value) < 200 else value[:200] + '...'}")
        for vector in concept.vectors:
            line = f"  norm {vector.norm():.3f}"
            if width == table.shape[1]:
                nearest = F.cosine_similarity(vector[None], table).topk(5)
                words = (f"{token(model, [], i)} {c:.2f}" for c, i in zip(*map(list, nearest)))
                line += f" (words here: {low:.3f}, {middle:.3f}, {high:.3f}); nearest: "
                line += ", ".join(words)
            print(line)
        if width != table.shape[1]:
            print(f"  learnt with another model: this one's words have {table.shape[1]} numbers")


LESS_MEMORY = {
    "invert": "--batch-size 1, --gradient-checkpointing, --precision bf16, --preview-every 0",
    "sample": "a smaller -n or --size, --precision bf16, --device cpu",
    "edit": "--reconstruct-steps 0, --precision bf16, --device cpu",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on standard error for a user's mistake, or 130
    after Ctrl-C."""
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    process = 0
    try:
        args = build_parser().parse_args(argv)
        with processes(getattr(args, "device", None)) as process:
            with quiet() if process > 0 else nullcontext():  # the first one speaks for all
                return args.run(args) or 0
    except (ValueError, OSError) as error:
        if process > 0:  # so has the first found, and said it
            return 2
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        remedy = LESS_MEMORY.get(args.verb, "--precision bf16, --device cpu")
        reason = f"out of memory; what helps: {remedy}"
        reason = f"process {process}: {reason}" if process > 0 else reason
    except KeyboardInterrupt:
        print("textinv: stopped", file=sys.stderr)
        return 130
    print(f"textinv: {' '.join(reason.split())}", file=sys.stderr)
    return 2
